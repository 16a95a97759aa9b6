"""What ``import nmgraph`` offers for looking: before training, while it runs, and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor, nn

from nmgraph.accounting.inspection import Inspection, inspect_plan
from nmgraph.accounting.macs import count_macs
from nmgraph.api import Progress, find_lazy, load, plan, recipe_of, require_gathered, require_plain, select, silent
from nmgraph.errors import ConversionError, ExportError, FileError
from nmgraph.export.inputs import Inputs, argument_names, find_inputs, make_inputs
from nmgraph.files import require_writable
from nmgraph.layers.recipe import Recipe
from nmgraph.methods import find_preset, make_method
from nmgraph.methods.contract import Method
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.hardware import HardwareReport, report_hardware
from nmgraph.passes.manifest import require_manifest
from nmgraph.passes.rewrite import require_finite
from nmgraph.passes.sensitivity import USUAL_PATTERNS, Sensitivity, measure
from nmgraph.passes.structure import unwrapped
from nmgraph.report.findings import Findings, gather
from nmgraph.training.controller import Controller
from nmgraph.training.telemetry import Telemetry, find_sink


def inspect(
    model: nn.Module,
    *,
    method: str | Method[Any] = "lbc",
    pattern: str | Pattern = "2:4",
    example_inputs: Any = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    layers: Mapping[str, str | Pattern] | None = None,
    keep_dense: Sequence[str] | None = None,
    block_axis: str | None = None,
    preset: str | None = None,
    progress: Progress = silent,
    **method_options: Any,
) -> Inspection:
    """Show what ``convert`` would make of every layer, what that gains and what each method costs; change nothing.

    What is not said below is as for ``convert``.

    Args:
        model: dense; on the meta device, too.
        example_inputs: as for ``convert``; by default the usual ones for the model's first layer, if it takes them.
            Operations are counted for these; without any they are not.
        progress: called with what begins.

    Raises:
        NMGraphError: what ``convert`` would raise.

    Examples:
        >>> import torch, nmgraph
        >>> found = nmgraph.inspect(torch.nn.Linear(64, 512), method="bimask", example_inputs=torch.ones(1, 64))
        >>> found.inference, found.likely
        (0.5, {'': 'unlikely'})
    """
    require_plain(model)
    published = find_preset(method, preset) if preset else None
    recipe = recipe_of(method, pattern, published, method_options)
    selection = select(skip, include, layers, keep_dense, block_axis, published)
    inputs = make_inputs(example_inputs) if example_inputs is not None else usual_inputs(model)
    planned = plan(model, recipe, selection, inputs=inputs, progress=progress)
    require_finite(planned.decisions)
    progress("counting operations")
    macs = None if inputs is None else count_macs(model, inputs.call)
    progress("comparing methods")
    return inspect_plan(planned, macs, "" if inputs is None else str(inputs))


def hardware(model: nn.Module) -> HardwareReport:
    """Say which layers of a converted model train on sparse tensor cores, what that gains, and why others do not.

    Args:
        model: converted; a wrapper around it (torch.compile, DDP) is looked through. What was not called yet is not
            known; print the report after the first steps.

    Raises:
        ConversionError: if the model was not converted.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"a {type(model).__name__} is no module. Give the converted model.")
    model = unwrapped(model)
    require_manifest(model)
    return report_hardware(model)


def sensitivity(
    model: nn.Module,
    inputs: Any,
    *,
    labels: Tensor | None = None,
    patterns: Sequence[str | Pattern] = USUAL_PATTERNS,
    method: str | Method[Any] = "lbc",
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    keep_dense: Sequence[str] | None = None,
    block_axis: str | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """Prune each layer alone, once, by magnitude, to each pattern, and measure how much worse the model answers.

    The model is not changed. ``nmgraph.accounting.budget.suggest`` makes per-layer patterns of the result.

    Args:
        model: dense, on any device.
        inputs: a tensor, a tuple of tensors or a dict of tensors: one batch of the model's own data.
        labels: of the batch. A forward that takes ``labels`` gets them, and its answer's ``loss`` counts; else the cross
            entropy of the answer, or its ``logits``. Without labels it counts how far the answer moves, as the sum of squared
            differences of all its floating-point tensors over the sum of their squares.
        patterns: to try. A layer that none of them fits is tried with the usual ones that do.
        method: that the model will be converted with; patterns that it does not support are left out.
        skip: as for ``convert``, of what is not to be measured; the same holds of the next three.
        include: globs of layers that are left dense by default.
        keep_dense: ``"stem"`` and ``"head"``.
        block_axis: ``"channels"`` or ``"flat"``.
        progress: called with what begins, and behind a colon how far it is.

    Raises:
        NMGraphError: if nothing can be pruned, the model does not take the data, or a loss is not finite.
    """
    require_plain(model)
    tried = [Pattern.parse(p) for p in ([patterns] if isinstance(patterns, (str, Pattern)) else patterns)]
    if not tried:
        raise ConversionError('there is no pattern to measure. Give some, for example patterns=["2:4", "1:4"].')
    if not isinstance(labels, (Tensor, NoneType)):
        raise ConversionError(
            f"labels are a {type(labels).__name__}; they must be a tensor, one label for each prediction."
        )
    given = make_inputs(inputs)
    selection = select(skip, include, None, keep_dense, block_axis, None)
    planned = plan(model, Recipe(make_method(method), tried[0]), selection, inputs=given, progress=progress)
    require_finite(planned.decisions)
    if labels is not None and not labels.is_floating_point():
        labels = labels.long()  # the one kind of class numbers that all losses take
    if labels is not None and "labels" in argument_names(model):
        given = replace(given, kwargs=given.kwargs | {"labels": labels})
    return measure(model, planned.decisions, tried, given.call, labels=labels, data=given.source, progress=progress)


def record(controller: Controller, *sinks: Any, every: int | None = None) -> Telemetry:
    """Record what masks do while a model trains: how many weights change sides, what masks keep, how far a method is.

    Args:
        controller: what ``attach`` gave; records are made after steps of its optimizer, without a further call.
        *sinks: names of files, ``.jsonl`` (what ``nmgraph report`` reads) or ``.csv``, which are appended to; a
            ``nmgraph.training.sinks.TensorBoard``; or anything that is called with each entry.
        every: steps between two records; by default 200 records a run, and no more often than every 50 steps.

    Returns:
        Its ``note(loss=loss)`` adds numbers of the loop to the records; its ``close()`` stops recording.

    Raises:
        NMGraphError: if ``every`` or a sink cannot be used.

    Examples:
        >>> import torch, nmgraph
        >>> net = nmgraph.convert(torch.nn.Linear(16, 8), method="srste")
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> seen = []
        >>> telemetry = nmgraph.record(nmgraph.attach(net, optimizer, total_steps=4), seen.append, every=2)
        >>> for step in range(4):
        ...     loss = net(torch.ones(1, 16)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     telemetry.note(loss=loss)
        >>> [type(entry).__name__ for entry in seen]
        ['Run', 'Record', 'Picture', 'Record', 'Picture', 'Record', 'Picture']
    """
    return Telemetry(controller, [find_sink(sink) for sink in sinks], every)


def report(
    model_or_path: nn.Module | str | Path,
    path: str | Path,
    *,
    log: str | Path | None = None,
    export: str | Path | None = None,
    model: nn.Module | str | None = None,
    trust: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write one HTML file about a model: its layers, its training, its masks, and what is proved. It needs no network.

    Args:
        model_or_path: a converted or finalized model, or a ``.nm.pt`` file.
        path: of the page.
        log: the training log, as ``record`` writes it into a ``.jsonl`` file.
        export: the directory that ``export`` wrote.
        model: for a file that does not hold its module: the dense model, or what makes it, as for ``load``.
        trust: packages whose pickled classes may be loaded, besides the usual.
        overwrite: replace an earlier file.

    Returns:
        The path.

    Raises:
        MissingPackageError: without matplotlib.
        FileError: if a file cannot be read or written, or belongs to another model.
        ConversionError: if the model was not converted.
    """
    write_report(find_findings(model_or_path, log, export, model, trust), Path(path), overwrite=overwrite)
    return Path(path)


def find_findings(
    model_or_path: nn.Module | str | Path,
    log: str | Path | None,
    export: str | Path | None,
    model: nn.Module | str | None = None,
    trust: Sequence[str] = (),
) -> Findings:
    """Gather what a report says; arguments and errors are those of ``report``."""
    name, found = "", model_or_path
    if not isinstance(found, nn.Module):
        name = Path(found).name
        if name.endswith((".safetensors", ".onnx")):
            raise FileError(
                f"{found} is what an export wrote; a report is about the converted model that it was exported from, a .nm.pt "
                f"file. Give that, and with --export (export=) the directory that {name} lies in."
            )
        found = load(found, model=model, trust=trust)
    require_gathered(found)
    log, export = (None if given is None else Path(given) for given in (log, export))
    return gather(unwrapped(found), file=name, log=log, export=export)


def write_report(findings: Findings, path: Path, *, overwrite: bool) -> None:
    """Write what was gathered as a page; errors are those of ``report``."""
    from nmgraph.report.html import write_page

    require_writable(path, overwrite=overwrite)
    write_page(findings, path)


def usual_inputs(model: nn.Module) -> Inputs | None:
    """Find inputs that a model takes, to count its operations; None if it does not say what it takes."""
    if find_lazy(model):
        return None  # a run would give the layers their shape
    try:
        return find_inputs(model, None)
    except ExportError:
        return None  # the table goes without what would be counted
