"""Whether cuSPARSELt's kernels do on this GPU what nmgraph takes for granted, and what a call of them costs."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bench import Bench, Piece, answer, relative
from torch import Tensor, nn
from torch.nn import functional as F

import nmgraph
from nmgraph.layers.probe import median_ms
from nmgraph.layers.sparse_product import compress, multiply_24
from nmgraph.nm.both_ways import both_ways, can_fuse
from nmgraph.nm.pattern import TENSOR_CORES
from nmgraph.nm.transposable import transposable_mask

RIGHT = 0.02  # of the largest result, as nmgraph.layers.probe takes it


def pieces(bench: Bench) -> Iterator[Piece]:
    dtypes = (torch.bfloat16, torch.float16)
    large = bench.pick([(1024, 4096), (4096, 1024), (11008, 4096)], [(4096, 1024)], [(64, 32)])
    for outputs, inputs in [(64, 64), *large]:
        for dtype in dtypes:
            yield f"products {outputs}x{inputs} {dtype}", partial(products, bench, outputs, inputs, dtype)
    yield "layouts", partial(layouts, bench)
    yield "rows", partial(rows, bench)
    yield "operands' kernel", partial(operands_kernel, bench)
    yield "tile kernel", partial(tile_kernel, bench)
    yield "cutlass", partial(cutlass, bench)
    rows_of = bench.pick(12608, 12608, 16)
    for outputs, inputs in bench.pick([(4096, 1024), (1024, 4096), (11008, 4096)], [(4096, 1024)], [(64, 32)]):
        for kind, probe in {"algorithms": algorithms, "split_k": splits}.items():
            yield f"{kind} {outputs}x{inputs}x{rows_of}", partial(probe, bench, outputs, inputs, rows_of)
    yield "captured", partial(captured, bench)
    yield "compiled layer", partial(compiled_layer, bench)
    yield "host overhead", partial(host_overhead, bench)
    yield "second thread", partial(second_thread, bench)


def transposable(bench: Bench, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    w_OC = bench.draw(outputs, inputs, dtype=dtype)
    return w_OC * transposable_mask(w_OC.float().unsqueeze(1), TENSOR_CORES).squeeze(1)


def products(bench: Bench, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, Any]:
    """Hold the products by W and by Wᵀ to dense ones."""
    w_OC = transposable(bench, outputs, inputs, dtype)
    x_RC, dy_RO = bench.draw(64, inputs, dtype=dtype), bench.draw(64, outputs, dtype=dtype)
    bias_O = bench.draw(outputs, dtype=dtype)
    errors = {
        "forward": relative(multiply_24(compress(w_OC), x_RC, None, outputs, 0), F.linear(x_RC, w_OC)),
        "forward with bias": relative(multiply_24(compress(w_OC), x_RC, bias_O, outputs, 0), F.linear(x_RC, w_OC, bias_O)),
        "input gradient": relative(multiply_24(compress(w_OC.t().contiguous()), dy_RO, None, inputs, 0), dy_RO @ w_OC),
        "not compressed before": relative(multiply_24(w_OC, x_RC, None, outputs, 0), F.linear(x_RC, w_OC)),
    }  # fmt: skip
    return {"right": max(errors.values()) <= RIGHT, "errors": errors}


def layouts(bench: Bench) -> dict[str, Any]:
    """See what a compressed weight looks like, and what of shapes is taken."""
    found = {}
    for outputs, inputs in ((16, 16), (64, 64), (64, 128), (1024, 4096), (80, 48)):
        packed = compress(transposable(bench, outputs, inputs, torch.bfloat16))
        share = packed.numel() / (outputs * inputs)
        found[f"{outputs}x{inputs}"] = {"shape": list(packed.shape), "share": share, "dtype": str(packed.dtype)}
    odd = bench.draw(24, 64)
    found["24x64"] = answer(lambda: list(compress(odd * (odd > 10)).shape))
    return found


def rows(bench: Bench) -> dict[str, Any]:
    """Multiply inputs whose rows are no multiple of 8, padded as nmgraph does and as they are."""
    w_OC = transposable(bench, 64, 64, torch.bfloat16)
    found: dict[str, Any] = {}
    for count in (1, 8, 12, 17, 197):
        x_RC, packed = bench.draw(count, 64), compress(w_OC)
        padded = relative(multiply_24(packed, x_RC, None, 64, 0), F.linear(x_RC, w_OC))
        plain = answer(
            lambda x_RC=x_RC, packed=packed: relative(
                torch._cslt_sparse_mm(packed, x_RC.t(), transpose_result=True), F.linear(x_RC, w_OC)
            )
        )
        found[str(count)] = {"padded": padded, "as they are": plain}
    return found


def operands_kernel(bench: Bench) -> dict[str, Any]:
    """Hold nmgraph's own kernel, which makes the operands of both products, to the passes that it replaces."""
    found: dict[str, Any] = {}
    for outputs, inputs in bench.pick([(4096, 1024), (1000, 272)], [(1000, 272)], [(64, 32)]):
        w_OC = transposable(bench, outputs, inputs, torch.bfloat16).float()
        order_O = torch.randperm(len(w_OC), device=bench.device)
        for name, order, pattern in (("t-mask", None, None), ("bi-mask", order_O, TENSOR_CORES)):
            made = [
                both_ways(w_OC, torch.bfloat16, order, pattern, fused=fused)
                for fused in (can_fuse(w_OC, pattern), False)
            ]
            equal = all(torch.equal(own, plain) for own, plain in zip(*made, strict=True))
            found[f"{name} {outputs}x{inputs}"] = {"fused": can_fuse(w_OC, pattern), "equal": equal}
    return found


def tile_kernel(bench: Bench) -> Any:
    """Multiply by what torch's fused pruning kernel packs for cuSPARSELt: its layout was found out on another chip."""
    w_OC, x_CR = bench.draw(256, 256), bench.draw(256, 64)

    def tried() -> dict[str, Any]:
        packed, _, packed_t, _, kept = torch._sparse_semi_structured_tile(w_OC, "", use_cutlass=False)
        pruned_OC = torch._sparse_semi_structured_apply_dense(w_OC, kept)
        zeros = float((pruned_OC == 0).float().mean())
        errors = {}
        for name, w, p in (("forward", pruned_OC, packed), ("transposed", pruned_OC.t(), packed_t)):
            y = torch._cslt_sparse_mm(p.view(256, -1), x_CR)
            errors[name] = relative(y, w @ x_CR)
        return {"verdict": "right" if max(errors.values()) <= RIGHT else "wrong", "errors": errors, "zeros": zeros}

    return answer(tried)


def cutlass(bench: Bench) -> Any:
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    w_OC, x_CR = transposable(bench, 256, 256, torch.float16), bench.draw(256, 64, dtype=torch.float16)

    def tried() -> str:
        y = SparseSemiStructuredTensorCUTLASS.from_dense(w_OC) @ x_CR
        return "right" if relative(y, w_OC @ x_CR) <= RIGHT else "wrong"

    return answer(tried)


def algorithms(bench: Bench, outputs: int, inputs: int, rows: int) -> dict[str, Any]:
    """Time every algorithm that cuSPARSELt lets one choose, beside the one that its search chooses."""
    w_OC, x_RC = transposable(bench, outputs, inputs, torch.bfloat16), bench.draw(rows, inputs)
    packed, expected = compress(w_OC), F.linear(x_RC, w_OC)
    found: dict[str, Any] = {"dense_ms": median_ms(partial(F.linear, x_RC, w_OC), bench.device), "by_number": {}}
    began = time.monotonic()
    searched = answer(lambda: torch._cslt_sparse_mm_search(packed, x_RC.t(), transpose_result=True))
    found |= {"searched": searched, "search_s": time.monotonic() - began}
    full = getattr(torch._C, "_cusparselt", None)
    if full is not None and not bench.dry:  # algorithm, split_k, its mode, and how many algorithms there are
        found["search_in_full"] = answer(lambda: list(full.mm_search(packed, x_RC.t(), None, None, None, True)))
    for number in range(bench.pick(64, 64, 3)):
        found["by_number"][str(number)] = timing = answer(partial(_timed, bench, packed, x_RC, expected, alg_id=number))
        if isinstance(timing, str) or bench.left < 0:
            break
    return found


def splits(bench: Bench, outputs: int, inputs: int, rows: int) -> dict[str, Any]:
    """Time the sum cut into parts, in each of cuSPARSELt's modes."""
    w_OC, x_RC = transposable(bench, outputs, inputs, torch.bfloat16), bench.draw(rows, inputs)
    packed, expected = compress(w_OC), F.linear(x_RC, w_OC)
    return {
        f"{parts}, mode {mode}": answer(
            partial(_timed, bench, packed, x_RC, expected, alg_id=0, split_k=parts, split_k_mode=mode)
        )
        for parts in (1, 2, 4)
        for mode in (-1, 0, 1)
    }


def _timed(bench: Bench, packed: Tensor, x_RC: Tensor, expected: Tensor, **options: int) -> dict[str, Any]:
    work = partial(torch._cslt_sparse_mm, packed, x_RC.t(), transpose_result=True, **options)
    right = relative(work(), expected) <= RIGHT
    return {"ms": median_ms(work, bench.device), "right": right}


def captured(bench: Bench) -> dict[str, Any]:
    """Capture compressing and multiplying, and replay it with other values in the weight."""
    w_OC, x_RC = transposable(bench, 256, 256, torch.bfloat16), bench.draw(64, 256)
    replay, y_RO = bench.captured(lambda: multiply_24(w_OC, x_RC, None, 256, 0))
    errors = {}
    for turn in ("as captured", "negated", "another mask"):
        if turn == "negated":
            w_OC.neg_()
        elif turn == "another mask":
            w_OC.copy_(transposable(bench, 256, 256, torch.bfloat16))
        replay()
        bench.synchronize()
        errors[turn] = relative(y_RO, F.linear(x_RC, w_OC))
    return {"right": max(errors.values()) <= RIGHT, "errors": errors}


def converted(bench: Bench, inputs: int, outputs: int) -> tuple[nn.Module, Any]:
    layer = nn.Sequential(nn.Linear(inputs, outputs)).to(bench.device)
    nmgraph.convert(layer, method="tmask", hardware="force")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    nmgraph.attach(layer, optimizer, total_steps=1000)
    return layer, optimizer


def compiled_layer(bench: Bench) -> dict[str, Any]:
    """Train a layer whose CUDA graphs torch.compile makes; what it gives has to follow the weight."""
    inputs, outputs = bench.pick((1024, 4096), (1024, 4096), (64, 32))
    layer, optimizer = converted(bench, inputs, outputs)
    x_RC = bench.draw(64, inputs)
    fast = bench.compiled(layer, mode="reduce-overhead")
    errors = []
    for _ in range(5):
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            y_RO = fast(x_RC)
            expected_RO = F.linear(x_RC, layer[0].weight.detach(), layer[0].bias)
        errors.append(relative(y_RO, expected_RO))
        y_RO.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"right": max(errors) <= RIGHT, "errors": errors, "hardware": str(nmgraph.hardware(layer))}


def host_overhead(bench: Bench) -> dict[str, Any]:
    """Queue many calls: how long the host takes for one, and how long the device."""
    calls = bench.pick(200, 100, 3)
    found = {}
    for rows in bench.pick((64, 4096), (64,), (16,)):
        inputs, outputs = bench.pick((1024, 1024), (1024, 1024), (64, 64))
        w_OC, x_RC = transposable(bench, outputs, inputs, torch.bfloat16), bench.draw(rows, inputs)
        packed = compress(w_OC)
        layer, _ = converted(bench, inputs, outputs)
        works: dict[str, Callable[[], Any]] = {
            "F.linear": partial(F.linear, x_RC, w_OC),
            "_cslt_compress": partial(compress, w_OC),
            "_cslt_sparse_mm": lambda x_RC=x_RC, packed=packed: torch._cslt_sparse_mm(packed, x_RC.t(), transpose_result=True),
            "multiply_24": partial(multiply_24, packed, x_RC, None, outputs, 0),
            "converted layer": partial(_autocast, bench, layer, x_RC),
        }  # fmt: skip
        for name, work in works.items():
            found[f"{name}, {rows} rows"] = _queued(bench, work, calls)
    return found


def _autocast(bench: Bench, layer: nn.Module, x_RC: Tensor) -> None:
    with torch.autocast(bench.device.type, dtype=torch.bfloat16):
        layer(x_RC)


def _queued(bench: Bench, work: Callable[[], Any], calls: int) -> dict[str, float]:
    for _ in range(5):
        work()
    bench.synchronize()
    began, start = time.perf_counter(), bench.mark()
    for _ in range(calls):
        work()
    queued = time.perf_counter() - began
    ms = bench.between(start, bench.mark())
    return {"host_us": 1e6 * queued / calls, "until_done_us": 1e3 * ms / calls}


def second_thread(bench: Bench) -> dict[str, Any]:
    """Multiply in a thread of our own, and in autograd's."""
    w_OC, x_RC = transposable(bench, 64, 64, torch.bfloat16), bench.draw(16, 64)
    given: list[Any] = []
    thread = threading.Thread(target=lambda: given.append(answer(lambda: multiply_24(w_OC, x_RC, None, 64, 0))))
    thread.start()
    thread.join()
    own = given[0] if isinstance(given[0], str) else relative(given[0], F.linear(x_RC, w_OC))
    layer, optimizer = converted(bench, 64, 64)
    x_RC.requires_grad_()
    gradients = []
    for _ in range(2):  # before the first step and after it
        x_RC.grad = None
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            y_RO = layer(x_RC)
        y_RO.sum().backward()
        expected_RC = torch.ones_like(y_RO) @ layer[0].weight.detach().to(y_RO.dtype)
        gradients.append(relative(x_RC.grad, expected_RC))
        optimizer.step()
    return {"own thread": own, "autograd's": gradients}
