"""What every section gets: the device, how large its work may be, and how long; with clocks for a GPU and for the CPU."""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import record
import torch
from torch import Tensor

from nmgraph.layers import probe

Value = TypeVar("Value")
Piece = tuple[str, Callable[[], Any]]  # a name, and work that gives plain values
Section = Callable[["Bench"], Iterator[Piece]]
_SLOW_MS = 100.0


@dataclass(frozen=True)
class Bench:
    """Where a section runs.

    Attributes:
        device: the GPU; the CPU in a dry run.
        dry: tiny sizes, with a stand-in for the kernels, to see that every line runs.
        quick: a part of everything.
        ends: when the section's time is over, as ``time.monotonic`` counts.
        cifar: where CIFAR-10 lies.
    """

    device: torch.device
    dry: bool = False
    quick: bool = False
    ends: float = float("inf")
    cifar: Path | None = None

    @property
    def left(self) -> float:
        """Seconds until the section's time is over."""
        return self.ends - time.monotonic()

    @property
    def mode(self) -> str:
        """What ``hardware=`` is to be; no timing would ever choose the stand-in."""
        return "force" if self.dry else "auto"

    def pick(self, full: Value, quick: Value, dry: Value) -> Value:
        return dry if self.dry else quick if self.quick else full

    def kernels(self) -> AbstractContextManager[Any]:
        """Give what multiplies: the GPU's own kernels, or in a dry run the stand-in, timed once, as it tells nothing."""
        if not self.dry:
            return nullcontext()
        probe._WARM_UP, probe._ROUNDS = 0, 1
        return _stand_in().kernels()

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def compiled(self, work: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
        if self.dry:
            return torch.compile(work, backend="aot_eager")
        return torch.compile(work, mode=mode)

    def captured(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture work in a CUDA graph; give its replay, and the tensor that it writes. The CPU does it again instead."""
        if self.device.type != "cuda":
            out = work()
            return lambda: void(out.copy_(work())), out
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work()
        return graph.replay, out

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Time some work: the median of many times, or the second one of what is slow."""
        for _ in range(2):
            began = self.mark()
            work()
            once = self.between(began, self.mark())
        return once if once > _SLOW_MS else probe.median_ms(work, self.device)

    def mark(self) -> Any:
        """Note a moment in the device's work, for :meth:`between`."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, began: Any, ended: Any) -> float:
        """Give the milliseconds between two moments; waits for the second one."""
        if self.device.type != "cuda":
            return float(1e3 * (ended - began))
        ended.synchronize()
        return float(began.elapsed_time(ended))


def answer(work: Callable[[], Any]) -> Any:
    """Do what a library may refuse; give its result, or what it said."""
    try:
        return work()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as refused:
        return f"refused: {type(refused).__name__}: {str(refused).partition(chr(10))[0]}"


def relative(found: Tensor, expected: Tensor) -> float:
    """Give the largest difference, as a share of the largest number that was expected."""
    found, expected = (t.detach().double().cpu() for t in (found, expected))
    difference = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    return float("inf") if math.isnan(difference) else difference  # which no comparison lets pass


def say(text: str) -> None:
    print(text, flush=True)


def void(_: object) -> None:
    """Leave a result out."""


def _stand_in() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stand_in", record.ROOT / "tests" / "stand_in.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
