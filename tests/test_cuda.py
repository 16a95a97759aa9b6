"""What can only be seen on a GPU. Skipped elsewhere."""

import copy
import dataclasses

import pytest
import torch
from handles import nm
from torch import nn

import nmgraph
from nmgraph.layers.hardware import missing
from nmgraph.layers.probe import Product, measure, median_ms
from nmgraph.nm.both_ways import both_ways
from nmgraph.nm.pattern import Pattern

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

METHODS = sorted(nmgraph.METHODS)


def network():
    return nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 16))


def batches(steps, device):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 8, 8, 8, generator=generator)
        yield x.to(device), torch.randint(0, 16, (16,), generator=generator).to(device)


def train(model, optimizer, steps, *, scaler=None, dtype=None):
    device = next(model.parameters()).device
    for x, y in batches(steps, device):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return loss.item()


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_a_step_are_those_of_the_cpu(method):
    on_cpu = nmgraph.convert(network(), method=method)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    assert torch.equal(nm(on_cpu[0]).mask(), nm(on_gpu[0]).mask().cpu())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    lambda p: torch.optim.AdamW(p, torch.tensor(1e-3), capturable=True),
], ids=["sgd", "fused", "capturable"])  # fmt: skip
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_trains_to_exact_patterns(method, make, dtype):
    model = nmgraph.convert(network().cuda(), method=method)
    optimizer = make(model.parameters())
    nmgraph.attach(model, optimizer, total_steps=20)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0) if dtype == torch.float16 else None
    train(model, optimizer, 20, scaler=scaler, dtype=dtype)
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_one_that_never_stopped(method):
    def start():
        torch.manual_seed(0)
        model = nmgraph.convert(network().cuda(), method=method)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        nmgraph.attach(model, optimizer, total_steps=12)
        return model, optimizer

    torch.use_deterministic_algorithms(True)
    try:
        model, optimizer = start()
        train(model, optimizer, 6)
        resumed, resumed_optimizer = start()
        resumed.load_state_dict(model.state_dict())
        resumed_optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 6)
        train(resumed, resumed_optimizer, 6)
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("method", METHODS)
def test_compiled_model_answers_as_the_eager_one(method):
    model = nmgraph.convert(network().cuda(), method=method).eval()
    x = torch.randn(4, 8, 8, 8, device="cuda")
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-3)


def test_export_of_a_model_on_the_gpu(tmp_path):
    model = nmgraph.convert(network().cuda(), method="srste")
    assert nmgraph.export(model, tmp_path / "out", example_inputs=torch.randn(1, 8, 8, 8)).holds
    assert next(model.parameters()).is_cuda


@pytest.mark.parametrize("pattern", [None, "1:2", "2:4", "4:8", "4:16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_writes_the_operands_of_both_products_that_torch_does(pattern, stored, dtype):
    pytest.importorskip("triton")
    w = torch.randn(1000, 776, device="cuda", dtype=stored)
    order = torch.randperm(1000, device="cuda")
    for weight in (w, w.t().contiguous().t()):
        found, expected = (
            both_ways(weight, dtype, order, pattern and Pattern.parse(pattern), fused=fused) for fused in (True, False)
        )
        assert all(map(torch.equal, found, expected))


needs_sparse_cores = pytest.mark.skipif(bool(missing()), reason=missing() or "there are some")


def wide(channels=512):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)).cuda()


def trained(method, mode, *, dtype=torch.bfloat16, steps=3, compiled=None, **options):
    model = nmgraph.convert(wide(), method=method, hardware=mode, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    nmgraph.attach(model, optimizer, total_steps=steps)
    called = model if compiled is None else torch.compile(model, mode=compiled)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=dtype == torch.float16)
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x = torch.randn(1000, 512, generator=generator).cuda().requires_grad_()
        with torch.autocast("cuda", dtype=dtype):
            loss = (called(x) - x).square().mean()
        scaler.scale(loss).backward()
        seen.append((loss.detach().clone(), x.grad.clone()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, seen


@needs_sparse_cores
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("product", [
    Product(1024, 512, 4096, "{}", bias=True), Product(512, 1024, 4096, "{}", input_gradient=True, gathers=True),
    Product(16, 16, 16, "{}"), Product(48, 80, 16, "{}"),
], ids=str)  # fmt: skip
def test_the_kernels_give_the_masked_product(dtype, product):
    named = dataclasses.replace(product, dtype=str(dtype).removeprefix("torch."))
    assert measure(named, torch.device("cuda")).failure == ""


@needs_sparse_cores
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_training_on_sparse_cores_is_that_of_masked_weights(method, dtype):
    options = {"interval": 1} if method in ("bimask", "tmask") else {}
    model, ours = trained(method, "force", dtype=dtype, **options)
    _, theirs = trained(method, "off", dtype=dtype, **options)
    assert model[0].nm_notes["weight"].hardware is not None
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(b[1].abs().max()))


@needs_sparse_cores
@pytest.mark.parametrize("compiled", ["default", "reduce-overhead"])
@pytest.mark.parametrize("method", ["tmask", "bimask", "srste"])
def test_compiled_training_on_sparse_cores(compiled, method):
    _, ours = trained(method, "force", compiled=compiled, steps=6)
    _, theirs = trained(method, "off", steps=6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(b[1].abs().max()))


@needs_sparse_cores
def test_a_replayed_graph_multiplies_by_the_weights_of_now():
    model = nmgraph.convert(wide().bfloat16(), method="srste", hardware="force")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nmgraph.attach(model, optimizer, total_steps=10)
    x = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    for _ in range(3):
        y = graphed(x)
        y.float().square().mean().backward()
        reference = nmgraph.finalize(model)
        torch.testing.assert_close(y, reference(x), rtol=0.05, atol=0.05)
        optimizer.step()
        optimizer.zero_grad()


@needs_sparse_cores
def test_auto_never_makes_a_layer_slower():
    torch.manual_seed(0)
    times = {}
    x = torch.randn(16384, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for mode in ("off", "auto"):
        model = nmgraph.convert(wide(1024).bfloat16(), method="tmask", hardware=mode)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        nmgraph.attach(model, optimizer, total_steps=1000)
        times[mode] = median_ms(lambda model=model: model(x).sum().backward(), torch.device("cuda"))
    assert times["auto"] < 1.05 * times["off"]
