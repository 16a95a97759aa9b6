"""Build the engine and its dense twin, run both, and say what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.markup import escape
from rich.table import Table
from torch import nn

from nmgraph.export.inputs import Inputs
from nmgraph.export.parity import Parity, compare_outputs
from nmgraph.export.proof import Product, list_products
from nmgraph.export.trt_build import Build, build_engine, deserialize, inspect_engine, load_engine
from nmgraph.export.trt_files import CACHE, ENGINE, LAYERS, LOG
from nmgraph.export.trt_machine import SPARSE_CAPABILITY, Machine, this_machine, write_machine
from nmgraph.export.trt_run import Execution, Timing, time_in_turns
from nmgraph.export.trt_tactics import SPARSE, LayerTactic, judge, parse_inspector, parse_log
from nmgraph.passes.verification import Verification

TOLERANCE = {"fp32": 1e-2, "fp16": 5e-2}
"""Wider than for ONNX Runtime: TensorRT multiplies fp32 as TF32, and may add up fp16 in fp16."""


@dataclass(frozen=True)
class TensorRT:
    """What an export wants of TensorRT: at least the trtexec line.

    Attributes:
        module: the ``tensorrt`` module, to build an engine with; None builds none.
        compare: build the dense twin, too.
    """

    module: Any
    compare: bool


@dataclass(frozen=True)
class EngineReport:
    """What was built, and what was found of it.

    Attributes:
        machine: what the engine is bound to.
        precision: of the engine, which is that of the ONNX file.
        parity: the engine's answer against the finalized model's.
        layers: what became of every product with a weight.
        sparse: time of one run.
        dense: that of the twin, built from the same file without sparse tactics; None without comparison.
        log_speaks: whether the build log says anything of sparsity.
    """

    machine: Machine
    precision: str
    parity: Parity
    layers: tuple[LayerTactic, ...]
    sparse: Timing
    dense: Timing | None
    log_speaks: bool

    @property
    def holds(self) -> bool:
        """Tell whether the engine answers as the model does; its speed is no promise."""
        return self.parity.holds

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time."""
        return None if self.dense is None else self.dense.median_ms / self.sparse.median_ms

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of this engine, in sentences."""
        found = []
        capability = tuple(map(int, self.machine.compute_capability.split(".")))
        if capability < SPARSE_CAPABILITY:
            found.append(
                f"{self.machine.gpu} has no sparse tensor cores; they begin with compute capability 8.0 (Ampere)."
            )
        if not self.log_speaks:
            found.append("The build log says nothing of sparsity, so eligible is not known.")
        if self.speedup is not None and self.speedup < 1:
            found.append("The dense twin is faster: build without --sparsity=enable for use.")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {"holds": self.holds, **asdict(self), "speedup": self.speedup, "notes": list(self.notes)}

    def __str__(self) -> str:
        counts = Counter(layer.runs for layer in self.layers)
        picked = f"{counts.pop(SPARSE, 0)} of {len(self.layers)} products on sparse kernels"
        others = "".join(f", {count} {runs}" for runs, count in sorted(counts.items()))
        dense = f"; the dense twin {self.dense.median_ms:.3f} ms ({self.speedup:.2f}x)" if self.dense else ""
        return f"{picked}{others}; {self.sparse.median_ms:.3f} ms{dense}; {self.parity}"

    def __rich__(self) -> Table:
        title = f"TensorRT engine in {self.precision} for {self.machine}"
        table = Table(title=escape(title), title_justify="left", header_style="bold")
        for column in ("product", "operator", "2:4", "eligible", "runs", "tactic"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            fits = f"[yellow]{layer.obstacle}" if layer.obstacle else "[green]ready"
            eligible = {None: "not known", True: "yes", False: "no"}[layer.eligible]
            runs = f"[green]{layer.runs}" if layer.runs == SPARSE else layer.runs
            name = ", ".join(layer.sites) or layer.node
            table.add_row(escape(name), layer.operator, fits, eligible, runs, escape(layer.tactic))
        if self.notes:
            table.caption, table.caption_justify = escape("\n".join(self.notes)), "left"
        return table


def write_engine(
    wanted: TensorRT, directory: Path, model: nn.Module, file: onnx.ModelProto, *, inputs: Inputs, precision: str,
    proof: Verification, old: Path, progress: Callable[[str], None],
) -> EngineReport:  # fmt: skip
    """Build ``model.onnx`` of a directory into an engine beside it, and its dense twin to compare with.

    Args:
        wanted: the ``tensorrt`` module, and whether to compare.
        directory: holds the ONNX file; engine, log, layers and timing cache are written there.
        model: what the file was written from.
        file: the file, loaded.
        inputs: what to run on.
        precision: of the file.
        proof: of the file, which says whose weights fit 2:4.
        old: timing cache of an earlier export, used if it is there.
        progress: called with what begins.

    Raises:
        ExportError: if TensorRT cannot build or run it.
    """
    trt, onnx_path = wanted.module, directory / "model.onnx"
    values = inputs.named([i.name for i in file.graph.input])
    shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
    timing_cache = old.read_bytes() if old.is_file() else b""
    stage = "building the sparse engine"
    progress(stage)
    built = build_engine(
        trt, onnx_path, shapes, sparse=True, timing_cache=timing_cache, progress=lambda p: progress(f"{stage}: {p}")
    )
    machine = this_machine(trt)
    _write(directory, built, machine)
    engine = load_engine(trt, directory / ENGINE)
    layers = inspect_engine(trt, engine)
    (directory / LAYERS).write_text(layers + "\n")
    twin = _dense_twin(trt, onnx_path, shapes, progress) if wanted.compare else None
    progress("running the engine" if twin is None else "running both engines")
    names = [o.name for o in file.graph.output]
    expected = dict(zip(names, inputs.outputs(model), strict=True))
    executions = [Execution(trt, e, values) for e in (engine, twin) if e is not None]
    found = dict(zip(names, executions[0].answer(names), strict=True))
    sparse, *dense = time_in_turns(executions)
    return EngineReport(
        machine, precision, compare_outputs(expected, found, TOLERANCE[precision]),
        _judge_all(list_products(file), proof, layers, built), sparse, dense[0] if dense else None,
        parse_log(built.log).eligible is not None,
    )  # fmt: skip


def _write(directory: Path, built: Build, machine: Machine) -> None:
    (directory / ENGINE).write_bytes(built.plan)
    (directory / CACHE).write_bytes(built.timing_cache)
    (directory / LOG).write_text("\n".join(built.log) + "\n")
    write_machine(directory / ENGINE, machine)


def _dense_twin(trt: Any, onnx_path: Path, shapes: dict[str, tuple[int, ...]], progress: Callable[[str], None]) -> Any:
    stage = "building the dense engine"
    progress(stage)
    # Without a timing cache: what was timed with sparse tactics allowed must not answer for the twin.
    twin = build_engine(trt, onnx_path, shapes, sparse=False, progress=lambda phase: progress(f"{stage}: {phase}"))
    return deserialize(trt, twin.plan, "the dense twin")


def _judge_all(products: Sequence[Product], proof: Verification, layers: str, built: Build) -> tuple[LayerTactic, ...]:
    shown, log = parse_inspector(layers), parse_log(built.log)
    obstacles = {check.name: check.tensorrt for check in proof.checks}
    return tuple(
        judge(p.node, p.operator, p.sites, obstacles.get((p.sites or (p.initializer,))[0], ""), shown, log)
        for p in products
    )
