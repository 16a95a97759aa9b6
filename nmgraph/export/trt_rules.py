"""What TensorRT's sparse tactics can take, said before any work is done for them.

The rule is NVIDIA's: of every four consecutive input channels, aligned at zero, at most two weights are non-zero.
"""

from __future__ import annotations

from nmgraph.errors import ExportError, PatternError
from nmgraph.nm.grouping import FLAT
from nmgraph.nm.pattern import TENSOR_CORES, Pattern
from nmgraph.passes.manifest import Entry, Manifest
from nmgraph.passes.verification import Verification


def parse_projection(text: str | Pattern) -> Pattern:
    """Read what to project on.

    Raises:
        ExportError: for a pattern other than 2:4, the only one that tensor cores know.
    """
    try:
        pattern = Pattern.parse(text)
    except PatternError as error:
        raise ExportError(f"--project: {error}") from error
    if pattern != TENSOR_CORES:
        raise ExportError(f"--project {pattern}: sparse tensor cores know 2:4 alone. Use --project 2:4.")
    return pattern


def require_sparse_sites(manifest: Manifest, projected: bool) -> None:
    """Refuse an engine in which no layer could be sparse.

    Raises:
        ExportError: naming the patterns and the remedy.
    """
    hopeless = [entry for entry in manifest.converted if _misfit(entry, projected)]
    if len(hopeless) < len(manifest.converted):
        return
    names = ", ".join(entry.name or "(root)" for entry in hopeless[:4])
    reasons = "; ".join(dict.fromkeys(_misfit(entry, projected) for entry in hopeless))
    now = "" if projected else ", or prune further now with --project 2:4, which the report tells the cost of"
    raise ExportError(
        f"no sparse layer ({names}{', ...' if len(hopeless) > 4 else ''}) could use TensorRT's "
        f"sparse tactics, which take at most 2 of every 4 input channels: {reasons}. Train at 2:4, 1:4, 2:8 or 1:16 "
        f"along the channels{now}."
    )


def sparsity_notes(manifest: Manifest, proof: Verification, precision: str) -> tuple[str, ...]:
    """Say, of an exported file, what its patterns and precision mean for TensorRT."""
    notes = [
        f"TensorRT keeps the precision of the ONNX file, {precision}; its builder has no switch for another in "
        "strongly typed networks."
    ]
    if precision == "fp32":
        notes.append(
            "Sparse tactics are documented for fp16 and int8; whether an fp32 engine gets any is not known. Export with "
            "--precision fp16."
        )
    for pattern in sorted(set(manifest.patterns.values()) - {TENSOR_CORES}):
        if pattern.implies(TENSOR_CORES):
            notes.append(f"{pattern} runs as 2:4, and no faster: tensor cores skip two of four, never more.")
    lost = [c for c in proof.checks if c.name in manifest.patterns and c.tensorrt]
    if lost:
        named = "; ".join(f"{c.name} ({c.pattern}: {c.tensorrt})" for c in lost)
        notes.append(f"Sparse, and yet dense in TensorRT: {named}.")
    return tuple(notes)


def _misfit(entry: Entry, projected: bool) -> str:
    """Tell why no weight of this site can be counted on to fit; empty if one can."""
    pattern, channels = Pattern.parse(entry.pattern), entry.shape[1]
    if not TENSOR_CORES.divides(channels):
        return TENSOR_CORES.misfit(channels)
    if projected:
        return ""
    if entry.axis == FLAT:
        return f"flat blocks of {pattern} run along the kernel window, not along the channels"
    return "" if pattern.implies(TENSOR_CORES) else f"{pattern} may keep more than 2 of 4"
