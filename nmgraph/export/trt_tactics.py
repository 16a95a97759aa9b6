"""Read from TensorRT's build log and engine inspector which layers run on sparse kernels.

The name of a layer's tactic decides. ``HasSparseWeights`` does not: engines with it and a dense tactic exist. Where
Myelin, TensorRT's own compiler, has taken a layer into a kernel that it generates, no tactic is named: not visible.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

SPARSE, DENSE, UNKNOWN, HIDDEN = "sparse", "dense", "unknown", "not visible"

_SPARSE_TACTIC = re.compile(r"sparse|sptensor|spmma|spgemm", re.IGNORECASE)
_DENSE_TACTIC = re.compile(r"implicit_gemm|_dense_|xmma_gemm", re.IGNORECASE)
_ELIGIBLE = re.compile(r"\(Sparsity\) Layers eligible for sparse math:(.*)")
_PICKED = re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_MYELIN_SUFFIX = re.compile(r"_myl\d+_\d+$")


@dataclass(frozen=True)
class SparsityLog:
    """What the build log says of sparsity; None where it says nothing.

    Attributes:
        eligible: names of ONNX nodes whose weights fit.
        picked: names of those for which a sparse kernel was fastest.
    """

    eligible: frozenset[str] | None
    picked: frozenset[str] | None


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine, as the inspector shows it.

    Attributes:
        name: as TensorRT calls it.
        kind: its type; empty if the engine was built without detail.
        tactic: name of the kernel; empty if none is shown.
        nodes: plain names of the ONNX nodes in it.
    """

    name: str
    kind: str
    tactic: str
    nodes: frozenset[str]

    @property
    def hidden(self) -> bool:
        """Tell whether Myelin runs it, without a tactic that says how."""
        return self.kind == "Myelin" or "ForeignNode[" in self.name or self.tactic.startswith("__myl")


@dataclass(frozen=True)
class LayerTactic:
    """What became of one product with a weight.

    Attributes:
        node: name in the ONNX file.
        operator: Conv, Gemm or MatMul.
        sites: the sparse layers whose weight it multiplies by.
        obstacle: why TensorRT can't take the weight as 2:4; empty if it can.
        eligible: whether the build log lists it as eligible; None if the log says nothing.
        runs: ``sparse``, ``dense``, ``unknown`` (a kernel of a name that tells neither) or ``not visible``.
        tactic: name of the kernel, where one is shown.
        said_by: what ``runs`` rests on: ``tactic``, ``build log`` or nothing.
    """

    node: str
    operator: str
    sites: tuple[str, ...]
    obstacle: str
    eligible: bool | None
    runs: str
    tactic: str
    said_by: str


def plain(name: str) -> str:
    """Reduce a name to letters, digits and underscores, as Myelin does."""
    return re.sub(r"\W", "_", name)


def parse_log(lines: Iterable[str]) -> SparsityLog:
    """Find the two lines on sparsity in a build log.

    >>> parse_log(["[INFO] (Sparsity) Layers eligible for sparse math: a + relu, b"]).eligible == {"a", "relu", "b"}
    True
    """
    text = list(lines)
    return SparsityLog(_listed(_ELIGIBLE, text), _listed(_PICKED, text))


def parse_inspector(text: str) -> tuple[EngineLayer, ...]:
    """Read the inspector's JSON of TensorRT 8, 10 or 11; text that is none gives no layers."""
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(_layer({"Name": entry} if isinstance(entry, str) else entry) for entry in layers)


def judge(
    node: str, operator: str, sites: tuple[str, ...], obstacle: str, layers: Sequence[EngineLayer], log: SparsityLog
) -> LayerTactic:
    """Tell what became of one ONNX node: by tactic where one is shown, else by the log."""
    own = [layer for layer in layers if plain(node) in layer.nodes]
    runs, tactic, said_by = _by_tactic(own)
    eligible = None if log.eligible is None else plain(node) in log.eligible
    if runs in (UNKNOWN, HIDDEN) and log.picked is not None and eligible:
        runs, said_by = (SPARSE if plain(node) in log.picked else DENSE), "build log"
    return LayerTactic(node, operator, sites, obstacle, eligible, runs, tactic, said_by)


def _by_tactic(own: Sequence[EngineLayer]) -> tuple[str, str, str]:
    for runs, pattern in ((SPARSE, _SPARSE_TACTIC), (DENSE, _DENSE_TACTIC)):
        found = next((layer.tactic for layer in own if not layer.hidden and pattern.search(layer.tactic)), None)
        if found is not None:
            return runs, found, "tactic"
    shown = next((layer.tactic for layer in own if layer.tactic and not layer.hidden), "")
    return (UNKNOWN if shown else HIDDEN), shown, ""


def _listed(pattern: re.Pattern[str], lines: Sequence[str]) -> frozenset[str] | None:
    found = [match[1] for line in lines if (match := pattern.search(line))]
    names = (name for text in found for layer in text.split(",") for name in _parts(layer))
    return frozenset(names) if found else None


def _layer(entry: dict[str, Any]) -> EngineLayer:
    name, metadata = str(entry.get("Name", "")), str(entry.get("Metadata", ""))
    nodes = {plain(node) for node in _ONNX_LAYER.findall(metadata)} | set(_parts(name))
    return EngineLayer(name, str(entry.get("LayerType", "")), str(entry.get("TacticName", "")), frozenset(nodes))


def _parts(fused: str) -> list[str]:
    """Split the name of a fused layer into those of its nodes."""
    return [plain(_MYELIN_SUFFIX.sub("", part.strip())) for part in fused.split(" + ") if part.strip()]
