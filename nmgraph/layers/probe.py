"""How long a product takes on this machine's GPU, dense and on sparse tensor cores; measured once, and remembered.

Each kind of product is a file in ``$NMGRAPH_CACHE``, by default ``~/.cache/nmgraph``, under the names of the GPU and of
the versions of torch and cuSPARSELt. A file that cannot be read is measured again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmgraph.errors import FileError, first_line
from nmgraph.files import written_atomically
from nmgraph.layers.sparse_product import compress, multiply_24
from nmgraph.nm.both_ways import both_ways, can_fuse
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import TENSOR_CORES, Pattern

WIN = 1.02  # times faster than dense before it is taken: less is noise
_TOLERANCE = 0.02  # of the largest result: both sum in float32 and round once
_WARM_UP, _ROUNDS = 10, 30
_DEFAULT = 0  # cuSPARSELt's own choice of algorithm
_log = logging.getLogger("nmgraph")


@dataclass(frozen=True)
class Product:
    """One kind of product ``x Wᵀ`` by a 2:4 weight.

    Attributes:
        outputs: O.
        inputs: C, which is summed over.
        rows: R.
        dtype: ``float16`` or ``bfloat16``.
        input_gradient: whether this is ``dY W``, whose weight lies in memory the other way when dense.
        bias: whether one is added.
        gathers: whether columns of x have to be put into another order first, for the sparse product alone.
    """

    outputs: int
    inputs: int
    rows: int
    dtype: str
    input_gradient: bool = False
    bias: bool = False
    gathers: bool = False

    def __str__(self) -> str:
        words = f"{self.outputs}x{self.inputs}x{self.rows}-{self.dtype}"
        flags = [f for f in ("input_gradient", "bias", "gathers") if getattr(self, f)]
        return "-".join([words, *flags])


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds of a product.

    Attributes:
        dense: the product by the masked weight.
        sparse: the product on sparse tensor cores, without what follows.
        gather: putting the columns of x into order.
        prepare: casting, for the input gradient ordering and transposing, and compressing the masked weight, once per
            optimizer step.
        algorithm: cuSPARSELt's number of the fastest.
        error: largest difference of the results, as a share of the largest result.
        failure: why the sparse product cannot be used.

    Raises:
        ValueError: for what no measurement gives.
    """

    dense: float
    sparse: float = 0.0
    gather: float = 0.0
    prepare: float = 0.0
    algorithm: int = 0
    error: float = 0.0
    failure: str = ""

    def __post_init__(self) -> None:
        times = self.dense, self.sparse, self.gather, self.prepare, self.error
        measured = all(isinstance(t, float) and 0.0 <= t < math.inf for t in times) and self.error <= _TOLERANCE
        numbered = type(self.algorithm) is int and 0 <= self.algorithm < 1 << 31
        if not (measured and numbered and isinstance(self.failure, str)):
            raise ValueError(f"{self} is no timing")

    @property
    def whole(self) -> float:
        """All of what the sparse product takes in a step of one batch."""
        return self.sparse + self.gather + self.prepare

    @property
    def usable(self) -> bool:
        """Tell whether the sparse product works, and gives the same as the dense one."""
        return not self.failure

    @property
    def pays_ungathered(self) -> bool:
        """Tell whether it would be faster if nothing had to be put into order."""
        return self.usable and self.dense > WIN * (self.whole - self.gather)

    @property
    def wins(self) -> bool:
        """Tell whether the sparse product is faster by more than noise."""
        return self.usable and self.dense > WIN * self.whole


def timing_of(product: Product, device: torch.device) -> Timing:
    """Give the timing of a product: remembered from this process or an earlier one, else measured now."""
    try:
        return _timing_of(product, str(device))
    except torch.OutOfMemoryError:  # which is no property of the product, and not remembered
        return Timing(0.0, failure="there was no memory left to time it")


@cache
def _timing_of(product: Product, device: str) -> Timing:
    path = _directory() / _machine(device) / f"{product}.json"
    try:
        kept = json.loads(path.read_text())
        if kept.keys() == {field.name for field in fields(Timing)}:
            return Timing(**kept)
    except (OSError, ValueError, AttributeError, RecursionError):
        pass  # not there yet, or not ours: it is measured, and written anew
    found = measure(product, torch.device(device))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps(asdict(found), indent=2) + "\n")
    except (OSError, FileError) as error:
        _say_once(f"timings of sparse products can't be kept: {error}. Set NMGRAPH_CACHE to a directory of yours.")
    return found


@cache
def _say_once(message: str) -> None:
    _log.warning("%s", message)


def _directory() -> Path:
    chosen = os.environ.get("NMGRAPH_CACHE")
    try:
        return Path(chosen) if chosen else Path.home() / ".cache" / "nmgraph"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "nmgraph"


@cache
def _machine(device: str) -> str:
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    words = f"{gpu}-torch{torch.__version__}-cusparselt{torch.backends.cusparselt.version() or 0}"
    return re.sub(r"[^\w.+-]+", "_", words)


@torch.no_grad()
def measure(product: Product, device: torch.device) -> Timing:
    """Time a product on random data, dense and sparse."""
    made = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, product.dtype)
    draw = partial(torch.randn, generator=made, device=device, dtype=dtype)
    w_OC = draw(product.outputs, product.inputs)
    w_OC *= magnitude_mask(w_OC.unsqueeze(1), TENSOR_CORES).squeeze(1)
    x_RC = draw(product.rows, product.inputs)
    bias = draw(product.outputs) if product.bias else None
    order = torch.randperm(product.inputs, generator=made, device=device)
    dense: Callable[[], Tensor] = partial(F.linear, x_RC, w_OC, bias)
    if product.input_gradient:
        dense = partial(torch.matmul, x_RC, w_OC.t().contiguous())
    source = w_OC.index_select(1, order.argsort()) if product.gathers else w_OC
    source = (source.t() if product.input_gradient else source).float().contiguous()

    def prepare() -> Tensor:
        """Make of the float32 weight, as its layer has it, what the product takes."""
        w = source.index_select(0, order) if product.gathers else source
        return compress((w.t() if product.input_gradient else w).to(dtype).contiguous())

    expected, failure, errors = dense(), "", {}
    try:
        packed = compress(w_OC)
        sparse = partial(multiply_24, packed, x_RC, bias, product.outputs)
        searched = torch._cslt_sparse_mm_search(packed, x_RC.t(), bias, transpose_result=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failed:  # whatever NVIDIA's libraries lack for this GPU or shape
        return Timing(median_ms(dense, device), failure=first_line(failed))
    for algorithm in dict.fromkeys((_DEFAULT, searched)):
        try:
            errors[algorithm] = _error(sparse(algorithm), expected)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failed:
            failure = first_line(failed)
    if not errors:
        return Timing(median_ms(dense, device), failure=failure)
    # What the search likes best is not always the fastest one.
    times = {algorithm: median_ms(partial(sparse, algorithm), device) for algorithm in errors}
    algorithm = min(times, key=lambda number: times[number])
    # The least of several is too low, so the one that is taken is timed again.
    return Timing(
        dense=median_ms(dense, device),
        sparse=median_ms(partial(sparse, algorithm), device),
        gather=median_ms(partial(x_RC.index_select, 1, order), device) if product.gathers else 0.0,
        prepare=median_ms(prepare, device),
        algorithm=algorithm,
        error=errors[algorithm],
    )


def _error(found: Tensor, expected: Tensor) -> float:
    """Give the largest difference as a share of the largest number; more than rounding is a failure."""
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= _TOLERANCE:  # nor NaN
        raise RuntimeError(f"its answer differs from the dense one by {error:.1%} of the largest")
    return error


_fusing: dict[tuple[Any, ...], bool] = {}


def fusing_pays(w_OC: Tensor, dtype: torch.dtype, order_O: Tensor | None, pattern: Pattern | None) -> bool:
    """Tell whether one kernel makes both operands of a weight faster than several; timed once per kind."""
    if not can_fuse(w_OC, pattern):
        return False
    kind = tuple(w_OC.shape), w_OC.stride(), w_OC.dtype, dtype, order_O is None, pattern, w_OC.device
    if kind not in _fusing:
        try:
            times = [
                median_ms(partial(both_ways, w_OC, dtype, order_O, pattern, fused=fused), w_OC.device)
                for fused in (True, False)
            ]
        except torch.OutOfMemoryError:
            return False
        _fusing[kind] = times[0] < times[1]
    return _fusing[kind]


def median_ms(work: Callable[[], object], device: torch.device) -> float:
    """Give the median time of some work in milliseconds, after a few rounds of warming up."""
    for _ in range(_WARM_UP):
        work()
    times = []
    for _ in range(_ROUNDS):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            work()
            ended.record()
            ended.synchronize()
            times.append(float(began.elapsed_time(ended)))
        else:
            started = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)
