"""What a report says, gathered from a model, its training log and its export, as plain values."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmgraph.accounting.cost import TrainingCost, cost_of_run, plan_cost
from nmgraph.accounting.macs import ModelMacs, count_macs
from nmgraph.errors import ConversionError, ExportError, FileError
from nmgraph.export.inputs import find_inputs
from nmgraph.layers.masked import MaskedWeight, buffer_names, class_name, masked_weights
from nmgraph.nm.packing import packed_bytes
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.manifest import Entry, Manifest, require_manifest
from nmgraph.passes.structure import parameter_of
from nmgraph.passes.verification import Verification, WeightCheck, verify_model
from nmgraph.training.run_log import LayerPicture, RunLog
from nmgraph.training.telemetry import take_picture


@dataclass(frozen=True)
class Layer:
    """One site, as a row of the table.

    Attributes:
        entry: what was decided about it.
        kept: share of its weights that are not masked, or not zero.
        unfinished: what is missing until its mask is N:M; empty if nothing is.
        check: what was found of its weight; None where nothing could be.
        weight_bytes: of the dense weight.
        compressed_bytes: of its kept values and their positions, once it is N:M.
        state_bytes: of what the method keeps beside it while it trains.
    """

    entry: Entry
    kept: float
    unfinished: str
    check: WeightCheck | None
    weight_bytes: int
    compressed_bytes: int
    state_bytes: int

    @property
    def kept_macs(self) -> float | None:
        """Multiply-accumulate operations of one forward with weights that are kept; None if not known."""
        return None if self.entry.macs is None else self.entry.macs * self.kept

    @property
    def verdict(self) -> str:
        """Say in a word or two where the site stands."""
        if not self.entry.converted:
            return "dense"
        if self.unfinished:
            return "unfinished"
        return "holds" if self.check is not None and self.check.holds else "fails"


@dataclass(frozen=True)
class Exported:
    """What an export's own report says.

    Attributes:
        name: of its directory.
        holds: whether every check held.
        checks: (check, whether it holds, what was found).
        files: names with their sizes in bytes.
        remarks: what else it says, in words.
    """

    name: str
    holds: bool
    checks: Sequence[tuple[str, bool, str]]
    files: dict[str, int]
    remarks: Sequence[str]

    @classmethod
    def read(cls, directory: Path, manifest: Manifest) -> Exported:
        """Read what ``nmgraph.export`` wrote about itself.

        Args:
            directory: the export.
            manifest: of the model that it has to be an export of.

        Raises:
            FileError: if it is no export, or one of another model.
        """
        try:
            values = json.loads((directory / "report.json").read_text(encoding="utf-8"))
            exported = Manifest.from_json((directory / "manifest.json").read_text(encoding="utf-8"))
            checks = [(str(c["check"]), bool(c["holds"]), str(c["found"])) for c in values["checks"]]
            files = {str(name): int(size) for name, size in values["files"].items()}
            remarks = [*_remarks(values), *map(str, values["notes"])]
            found = cls(directory.name, values["holds"] is True, checks, files, remarks)
        except OSError as error:
            raise FileError(
                f"{directory} is no export: {error.strerror or error}. Give the directory that `nmgraph export` wrote."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(
                f"{directory}: its report.json or manifest.json can't be read ({type(error).__name__}: {error}). "
                "Export the model again with this nmgraph."
            ) from error
        ours, theirs = ({e.name: (*e.shape, e.pattern) for e in m.converted} for m in (manifest, exported))
        other = [name for name in (*theirs, *ours) if ours.get(name) != theirs.get(name)]
        if other:
            raise FileError(
                f"{directory} is the export of another model: {other[0] or '(root)'} is not the same in both."
            )
        return found


def _remarks(values: dict[str, Any]) -> list[str]:
    said = [f"Weights are in {values['precision']}."]
    said += [f"Traced and compared with {values['inputs']}."] if values["inputs"] else []
    if values["compression"]:
        said.append(f"Compressed weights take {values['compression']['ratio']:.1%} of the dense ones.")
    if values["pruned"]:
        said.append(f"{len(values['pruned'])} unfinished layers were pruned by force.")
    if values["folded"]:
        said.append(f"{len(values['folded'])} batch norms were folded into the convolutions before them.")
    said += [f"{p['name']} was pruned further, from {p['before']} to {p['after']}." for p in values["projected"]]
    return said


@dataclass(frozen=True)
class Findings:
    """All that a report says.

    Attributes:
        model: class of the model.
        file: name of its file; empty for a model in memory.
        manifest: of its conversion.
        layers: all sites.
        verification: of its weights as they are now.
        step: steps done of the whole run.
        total_steps: of the whole run; 0 before a model is attached.
        pictures: of each converted layer as it is now.
        environment: (name, value) in words.
        cost: of its training, by the log or else as its methods plan it; None where the inputs are not known.
        log: of its training.
        log_file: its name.
        export: what was exported.
        missing: (what is missing, how to get it).
        doubts: what does not fit together.
    """

    model: str
    file: str
    manifest: Manifest
    layers: Sequence[Layer]
    verification: Verification
    step: int
    total_steps: int
    pictures: dict[str, LayerPicture]
    environment: Sequence[tuple[str, str]]
    cost: TrainingCost | None = None
    log: RunLog | None = None
    log_file: str = ""
    export: Exported | None = None
    missing: Sequence[tuple[str, str]] = field(default_factory=list)
    doubts: Sequence[str] = field(default_factory=list)

    @property
    def converted(self) -> list[Layer]:
        """Sites that are sparse."""
        return [layer for layer in self.layers if layer.entry.converted]

    @property
    def unfinished(self) -> list[Layer]:
        """Converted sites whose masks are not N:M yet."""
        return [layer for layer in self.converted if layer.unfinished]

    @property
    def kept(self) -> float:
        """Share of the converted layers' weights that is kept."""
        weights = sum(layer.entry.parameters for layer in self.converted)
        return sum(layer.kept * layer.entry.parameters for layer in self.converted) / weights

    @property
    def macs(self) -> tuple[float, float] | None:
        """Multiply-accumulate operations of one forward, dense and with kept weights; None if not known."""
        known = [layer for layer in self.layers if layer.entry.macs is not None]
        if not known:
            return None
        return float(sum(layer.entry.macs or 0 for layer in known)), sum(layer.kept_macs or 0.0 for layer in known)

    @property
    def verdict(self) -> tuple[str, str]:
        """Give the one sentence on top, and how it is meant: good, open or bad."""
        if self.unfinished:
            done = f"step {self.step:,} of {self.total_steps:,}" if self.total_steps else "not attached yet"
            count = f"{len(self.unfinished)} of {len(self.converted)} layers are not N:M yet"
            return f"Training has not finished: {done}; {count}.", "open"
        if not self.verification.holds:
            return f"The weights do not hold: {self.verification}.", "bad"
        holds = f"N:M holds in {len(self.converted)} of {len(self.converted)} converted layers"
        if self.export is None:
            return f"{holds}. Nothing exported is shown here yet.", "open"
        if not self.export.holds:
            return f"{holds}, but a check of the export did not hold.", "bad"
        return f"{holds}, and every check of the export holds.", "good"

    def summary(self) -> dict[str, Any]:
        """Give plain values: what stands on top of the page."""
        noted = {
            name: {"step": record.step, "value": value}
            for record in (self.log.records if self.log else ())
            for name, value in record.metrics.items()
            if value is not None
        }
        return {
            "model": self.model,
            "method": self.manifest.method,
            "verdict": self.verdict[0],
            "step": self.step,
            "total_steps": self.total_steps,
            "converted": len(self.converted),
            "skipped": len(self.layers) - len(self.converted),
            "unfinished": len(self.unfinished),
            "holds": self.verification.holds,
            "coverage": self.manifest.coverage,
            "kept": self.kept,
            "macs": None if self.macs is None else {"dense": self.macs[0], "kept": self.macs[1]},
            "training_macs": None
            if self.cost is None
            else {
                "recorded": bool(self.log and self.log.records),
                "over_dense": self.cost.ratio,
                "over_dense_on_24": self.cost.ratio_on_24,
            },
            "bytes": {
                name: sum(getattr(layer, f"{name}_bytes") for layer in self.converted)
                for name in ("weight", "compressed", "state")
            },
            "last_noted": noted,
            "export": None if self.export is None else asdict(self.export),
            "missing": [what for what, _ in self.missing],
            "doubts": list(self.doubts),
        }


def gather(model: nn.Module, *, file: str = "", log: Path | None = None, export: Path | None = None) -> Findings:
    """Look at a model and at what was written about it.

    Args:
        model: converted or finalized.
        file: name of the file that it is from.
        log: a training log, as ``nmgraph.record`` writes it.
        export: a directory, as ``nmgraph.export`` writes it.

    Raises:
        ConversionError: if the model was not converted, or has no values.
        FileError: if log or export cannot be read, or belong to another model.
    """
    manifest, masked = require_manifest(model), masked_weights(model)
    if any(p.is_meta for p in model.parameters()):
        raise ConversionError(
            f"{type(model).__name__} is on the meta device, so there are no weights to look at. Load them first."
        )
    verification = verify_model(model)
    checks = {check.name: check for check in verification.checks}
    named, usual = dict(model.named_parameters(remove_duplicate=False)), next(model.parameters())
    macs = _count(model, manifest)
    layers = [  # a skipped site's weight may be no parameter, but computed
        _layer(
            _counted(e, macs),
            masked.get(e.name),
            checks.get(e.name),
            named.get(parameter_of(e.name, named), usual).itemsize,
        )
        for e in manifest.entries
    ]
    clocks = [weight.clock.tolist() for weight in masked.values()]
    step, total = (min(clock[0] for clock in clocks), max(clock[1] for clock in clocks)) if clocks else (0, 0)
    run = None if log is None else _read_log(log, manifest, masked)
    with torch.no_grad():
        pictures = {name: take_picture(weight, weight.mask()) for name, weight in masked.items()}
    findings = Findings(
        class_name(model), file, manifest, layers, verification, step, total, pictures,
        _environment(model, masked, file, log, run, export), _cost(macs, masked, run, total), run, log.name if log else "",
        None if export is None else Exported.read(export, manifest),
    )  # fmt: skip
    return replace(findings, missing=_missing(findings), doubts=_doubts(findings, bool(masked)))


def _count(model: nn.Module, manifest: Manifest) -> ModelMacs | None:
    """Count operations, for the inputs of the conversion or else the usual ones; None if the model does not take them."""
    try:
        return count_macs(model, find_inputs(model, manifest, next(model.parameters()).dtype).call)
    except ExportError:
        return None


def _counted(entry: Entry, macs: ModelMacs | None) -> Entry:
    if entry.macs is not None or macs is None or entry.name not in macs.layers:
        return entry
    return replace(entry, macs=macs.layers[entry.name].forward)


def _cost(
    macs: ModelMacs | None, masked: dict[str, MaskedWeight], run: RunLog | None, total_steps: int
) -> TrainingCost | None:
    if macs is None or not sum(macs.total):
        return None  # not known, or of an empty batch
    if run is not None and run.records:
        return cost_of_run(macs, run)
    sparse = {name: (weight.told.method, weight.told.pattern) for name, weight in masked.items()}
    # The same that a log says of each weight.
    one_way = [n for n, weight in masked.items() if weight.told.method.splits_backward and not weight.splits_backward]
    steps = [total_steps] if total_steps else []
    return plan_cost(macs, sparse, *steps, forward_only=one_way) if sparse else None


def _layer(entry: Entry, weight: MaskedWeight | None, check: WeightCheck | None, itemsize: int) -> Layer:
    kept = 1.0 if check is None or not entry.converted else check.density
    state, unfinished = 0, ""
    if weight is not None:
        kept, unfinished = float(weight.mask().float().mean()), weight.unfinished() or ""
        buffers = (weight.layer._buffers[name] for name in buffer_names(weight.key, weight.told))
        state = sum(buffer.nbytes for buffer in buffers if buffer is not None)
    dense = entry.parameters * itemsize
    return Layer(entry, kept, unfinished, check, dense, _compressed(entry, itemsize) or dense, state)


def _compressed(entry: Entry, itemsize: int) -> int | None:
    if not entry.converted:
        return None
    pattern = Pattern.parse(entry.pattern)
    values = entry.parameters // pattern.m * pattern.n
    return values * itemsize + packed_bytes(values, pattern.m)


def _read_log(path: Path, manifest: Manifest, masked: dict[str, MaskedWeight]) -> RunLog:
    log, converted = RunLog.read(path), {e.name: e for e in manifest.converted}
    first = next(iter(log.run.layers), "")
    prefix = next(
        (first.removesuffix(name) for name in sorted(converted, key=len, reverse=True) if first.endswith(f".{name}")),
        "",
    )
    if {f"{prefix}{name}" for name in converted} <= set(log.run.layers):
        log = log.of_part(prefix)  # the model was trained inside of another, such as a LightningModule
    other = sorted(set(log.run.layers) - converted.keys())
    if other:
        raise FileError(
            f"{path} is the log of another model: of {other[0] or '(root)'}, the model has no such sparse layer."
        )
    if not log.run.layers:
        raise FileError(f"{path} is the log of another model: it has none of the sparse layers.")
    for e in (converted[name] for name in log.run.layers):
        told = log.run.layers[e.name]
        method = masked[e.name].told.method.name if e.name in masked else told["method"]
        there, here = (
            f"{told['method']} {told['pattern']} of {told['shape']}",
            f"{method} {e.pattern} of {list(e.shape)}",
        )
        if there != here:
            raise FileError(
                f"{path} is the log of another model: {e.name or '(root)'} is {there} there, and {here} here."
            )
    return log


def _missing(found: Findings) -> list[tuple[str, str]]:
    missing = []
    if found.log is None:
        missing.append((
            "How training went: no training log was given.",
            'While training: telemetry = nmgraph.record(controller, "run.jsonl"). Then: nmgraph report ... --log run.jsonl',
        ))  # fmt: skip
    elif not any("loss" in record.metrics for record in found.log.records):
        missing.append(("The loss: the loop did not note it.", "In the loop: telemetry.note(loss=loss)"))
    if found.unfinished:
        missing.append(("Masks that are N:M.", "Train to the end of total_steps, as given to nmgraph.attach."))
    if found.export is None:
        missing.append((
            "The proof on an exported file, and its parity with the model.",
            "nmgraph export MODEL.nm.pt, then: nmgraph report ... --export MODEL-export",
        ))  # fmt: skip
    if found.macs is None:
        missing.append((
            "How many operations a forward takes.",
            "Convert with example inputs: nmgraph convert ... --input 1x3x224x224, or convert(..., example_inputs=x)",
        ))  # fmt: skip
    return missing


def _doubts(found: Findings, masked: bool) -> list[str]:
    if found.log is None or not found.log.records:
        return []
    last, doubts = found.log.records[-1].step, []
    left = [layer.entry.name for layer in found.converted if layer.entry.name not in found.log.run.layers]
    if left:
        doubts.append(
            f"The log is of a part of the model: its optimizer did not train {left[0] or '(root)'}"
            f"{f' and {len(left) - 1} more' if len(left) > 1 else ''}, counted as dense in the cost of training."
        )
    if masked and last != found.step:
        doubts.append(f"The log ends at step {last:,}, but the model is at step {found.step:,}.")
    if masked and found.log.run.total_steps != found.total_steps:
        doubts.append(
            f"The log is of a run of {found.log.run.total_steps:,} steps, the model is of one of {found.total_steps:,}."
        )
    return doubts


def _environment(
    model: nn.Module,
    masked: dict[str, MaskedWeight],
    file: str,
    log: Path | None,
    run: RunLog | None,
    export: Path | None,
) -> list[tuple[str, str]]:
    """Name what the report was made with; of files the names alone, and nothing of who or where."""
    recipes: dict[str, int] = {}
    for weight in masked.values():
        options = ", ".join(f"{key}={value}" for key, value in weight.told.method.options().items())
        recipe = f"{weight.told.method.name} {weight.told.pattern}{f' ({options})' if options else ''}"
        recipes[recipe] = recipes.get(recipe, 0) + 1
    parameter = next(model.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else "CPU"
    rows = [("method", f"{recipe}: {count} layers") for recipe, count in recipes.items()]
    rows += [("model file", file)] if file else []
    rows += [("training log", log.name)] if log else []
    rows += [("export", export.name)] if export else []
    if run is not None:
        rows.append(("trained with", ", ".join(f"{name} {number}" for name, number in run.run.versions.items())))
    rows += [
        ("reported with", ", ".join(f"{name} {version(name)}" for name in ("nmgraph", "torch", "onnxruntime"))),
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}"),
        ("model is on", f"{device}, {str(parameter.dtype).removeprefix('torch.')}"),
        ("seeds", "of the method among its options; those of the training loop are not recorded"),
    ]
    return rows
