"""Check weights against their pattern, and say whether TensorRT could use them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from nmgraph.layers.kinds import is_layer, layer_axis
from nmgraph.layers.masked import PREFIX, class_name, masked_weights, site_name
from nmgraph.nm.grouping import FLAT, Axis, canonical
from nmgraph.nm.masks import check_blocks
from nmgraph.nm.pattern import TENSOR_CORES, Pattern
from nmgraph.passes.manifest import Manifest, find_manifest
from nmgraph.passes.structure import parameter_of

DEFAULT = Pattern(2, 4)
PAYS_FROM = 256  # channels in and out, by NVIDIA's maintainers; they say of no layer that it will


@dataclass(frozen=True)
class WeightCheck:
    """What was found of one weight.

    Attributes:
        name: of the site, or of the ONNX node.
        kind: class of the layer or operator.
        shape: of the weight as stored.
        pattern: what it was checked against.
        expected: whether it has to hold; a weight left dense on purpose does not.
        holds: whether every block keeps at most N.
        density: share of non-zero weights.
        finding: the worst block where it does not hold, or why it could not be checked.
        tensorrt: empty if TensorRT may take it for 2:4 sparse tactics, else why not.
        axis: which was checked: the one that is summed over, or ``flat``.
        node: name of the ONNX node that multiplies by it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    expected: bool
    holds: bool
    density: float
    finding: str = ""
    tensorrt: str = ""
    axis: Axis = 1
    node: str = ""

    @property
    def ready(self) -> bool:
        """Tell whether it holds, and TensorRT may take it for 2:4 sparse tactics."""
        return self.holds and not self.tensorrt

    @property
    def little_gain(self) -> str:
        """Say why sparse kernels hardly pay for a ready weight; empty if they may."""
        if not self.ready:
            return ""
        channels = min(self.shape[:2])
        return "" if channels >= PAYS_FROM else f"{channels} channels: little gain"


@dataclass(frozen=True)
class Verification:
    """What was found of a model or file.

    Attributes:
        subject: what was checked.
        checks: one per weight.
        problems: what is wrong beyond single weights.
        unchecked: tensors with two or more axes of which nothing says whether they are weights, where nothing recorded says
            what has to hold.
    """

    subject: str
    checks: tuple[WeightCheck, ...]
    problems: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Tell whether everything that has to hold does, and anything has to."""
        expected = [c for c in self.checks if c.expected]
        return bool(expected) and all(c.holds for c in expected) and not self.problems

    @property
    def failures(self) -> tuple[WeightCheck, ...]:
        """Checks that had to hold and did not."""
        return tuple(c for c in self.checks if c.expected and not c.holds)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        checks = [{**asdict(c), "little_gain": c.little_gain} for c in self.checks]
        return {"holds": self.holds, **asdict(self), "checks": checks}

    def __str__(self) -> str:
        expected = [c for c in self.checks if c.expected]
        ready = sum(c.ready for c in self.checks)
        text = f"{sum(c.holds for c in expected)} of {len(expected)} weights hold; {ready} ready for 2:4 sparse tactics"
        return "; ".join((text, *self.problems, *self._unchecked()))

    def _unchecked(self) -> list[str]:
        if not self.unchecked:
            return []
        shown = [*self.unchecked[:3], *([f"{len(self.unchecked) - 3} more"] * (len(self.unchecked) > 3))]
        return [f"not checked, as nothing says what they are: {', '.join(shown)}"]

    def __rich__(self) -> Table:
        table = Table(title=escape(f"{self.subject}: {self}"), title_justify="left", header_style="bold")
        for column in ("weight", "shape", "pattern", "TensorRT 2:4"):
            table.add_column(column, overflow="fold", no_wrap=column == "shape")
        for c in self.checks:
            verdict = (
                f"[green]{c.pattern} holds[/], {c.density:.0%} kept"
                if c.holds
                else f"[red]{c.pattern} fails[/]: {c.finding}"
            )
            if not c.expected:
                verdict = f"[dim]left dense, {c.density:.0%} kept"
            ready = "[green]ready" if c.ready else f"[yellow]{c.tensorrt or '-'}"
            ready += f"[/]; [dim]{c.little_gain}" if c.little_gain else ""
            shape = "x".join(map(str, c.shape))
            table.add_row(escape(c.name) or "(root)", shape, verdict, ready)
        return table


def check_weight(
    name: str, kind: str, weight: Tensor, pattern: Pattern, *, expected: bool, axis: Axis = 1, groups: int = 1
) -> WeightCheck:
    """Check one weight along its reduction axis.

    Args:
        name: of the site or node.
        kind: of the layer or operator.
        weight: as stored; ``shape[axis]`` counts the input channels of one group.
        pattern: to check against.
        expected: whether it has to hold.
        axis: the reduction axis, or ``flat``.
        groups: of a convolution.
    """
    shape, obstacle = tuple(weight.shape), _unreadable(weight)
    if obstacle:
        return WeightCheck(name, kind, shape, str(pattern), expected, False, 0.0, obstacle, obstacle, axis)
    if weight.dtype.itemsize == 1:
        weight = weight.float()  # few operations know 8 bits
    w_OSC = canonical(weight.detach(), axis)
    channels = w_OSC.shape[-1]
    density = float((w_OSC != 0).float().mean())
    tensorrt = _tensorrt_obstacle(canonical(weight.detach(), 1) if axis == FLAT else w_OSC, groups)
    if not pattern.divides(channels):
        finding = pattern.misfit(channels)
        return WeightCheck(name, kind, shape, str(pattern), expected, False, density, finding, tensorrt, axis)
    if not bool(torch.isfinite(w_OSC).all()):
        return WeightCheck(
            name, kind, shape, str(pattern), True, False, density, "it holds NaN or infinity", tensorrt, axis
        )
    check = check_blocks(w_OSC, pattern)
    o, s, g = check.worst
    finding = "" if check.holds else f"block {g} of output {o}, position {s} keeps {check.worst_count} of {pattern.m}"
    return WeightCheck(name, kind, shape, str(pattern), expected, check.holds, density, finding, tensorrt, axis)


def verify_model(model: nn.Module, pattern: Pattern | None = None) -> Verification:
    """Check every site of a model: those of its manifest, or without one all that the pattern fits.

    Args:
        model: converted, finalized or any other.
        pattern: to check against; default each site's own, or 2:4.
    """
    manifest = find_manifest(model)
    patterns, axes = (manifest.patterns, manifest.axes) if manifest else ({}, {})
    masked = masked_weights(model)
    checks = []
    for path, module in model.named_modules():
        kind = class_name(module)
        for key, parameter in module._parameters.items():
            name = site_name(path, key)
            if parameter is None or not (name in patterns or name in masked or (is_layer(module) and key == "weight")):
                continue
            told = masked[name].told if name in masked else None
            own = told.pattern if told else patterns.get(name)
            wanted = pattern or own or DEFAULT
            usual = layer_axis(module) if is_layer(module) else 1
            axis = told.reduction_axis if told else axes.get(name, usual)
            groups = getattr(module, "groups", 1) if is_layer(module) else 1
            fits = groups == 1 and parameter.dim() >= 2 and wanted.divides(parameter.shape[usual])
            weight = getattr(module, key)
            expected = own is not None or (manifest is None and fits)
            checks.append(check_weight(name, kind, weight, wanted, expected=expected, axis=axis, groups=groups))
    lost = [name for name in patterns if name not in {c.name for c in checks}]
    problems = [f"there is no layer {', '.join(lost[:4])} any more"] if lost else []
    unfinished = sum(weight.unfinished() is not None for weight in masked.values())
    problems += [f"training is not finished: {unfinished} layers are not N:M yet"] if unfinished else []
    problems += [] if checks else ["no Linear or convolution found"]
    unknown = (
        ()
        if manifest
        else _unknown(dict(model.named_parameters()), {parameter_of(c.name, ()) for c in checks} | _tables(model))
    )
    return Verification(class_name(model), tuple(checks), tuple(problems), unknown)


def verify_tensors(
    subject: str,
    tensors: dict[str, Tensor],
    pattern: Pattern | None = None,
    manifest: Manifest | None = None,
    unreadable: Sequence[WeightCheck] = (),
) -> Verification:
    """Check the weights of a state_dict, where only names and shapes are known.

    A tensor counts as a weight if it is called ``weight`` and has at least two axes. It has to hold if the manifest
    says so, or without one if its second axis is a multiple of M. What is said already of weights that could not be
    read stands first.
    """
    patterns, axes = (manifest.patterns, manifest.axes) if manifest else ({}, {})
    sites = {parameter_of(site, tensors): site for site in patterns}
    checks = list(unreadable)
    for name, tensor in tensors.items():
        is_weight = name in sites or name.rpartition(".")[2] == "weight"
        if is_weight and tensor.dim() >= 2 and tensor.is_floating_point():
            site = sites.get(name, "")
            wanted = pattern or patterns.get(site) or DEFAULT
            expected = name in sites if manifest else wanted.divides(tensor.shape[1])
            axis = axes.get(site, 1) if name in sites else 1
            checks.append(check_weight(name, f"{tensor.dim()}-D", tensor, wanted, expected=expected, axis=axis))
    problems: tuple[str, ...] = () if checks else ("no weight with two or more axes found",)
    if any(name.rpartition(".")[2].startswith(PREFIX) for name in tensors):
        problems += ("it is the state_dict of a converted model, whose weights are dense until it is finalized",)
    unknown = () if manifest else _unknown(tensors, {check.name for check in checks})
    return Verification(subject, tuple(checks), problems, unknown)


def _unknown(tensors: Mapping[str, Tensor], checked: Collection[str]) -> tuple[str, ...]:
    """Name what could be a weight and was not checked: an attention's ``in_proj_weight``, a matrix of its own."""
    return tuple(n for n, t in tensors.items() if t.dim() >= 2 and t.is_floating_point() and n not in checked)


def _tables(model: nn.Module) -> set[str]:
    """Name the tables of embeddings, which nothing multiplies by."""
    return {f"{path}.weight".lstrip(".") for path, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _unreadable(weight: Tensor) -> str:
    """Say why nothing can be read of a weight; empty if it can."""
    if weight.layout != torch.strided or weight.is_quantized:
        return f"it is stored as {weight.dtype if weight.is_quantized else weight.layout}".replace("torch.", "")
    if weight.is_meta or not weight.numel():
        return "it holds no values"
    return "" if weight.dim() >= 2 else f"it has {weight.dim()} axes"


def _tensorrt_obstacle(w_OSC: Tensor, groups: int) -> str:
    """Apply NVIDIA's rule: at most 2 non-zeros in every aligned quad of input channels, no grouped convolution."""
    if groups > 1:
        return "grouped convolution"
    if w_OSC.shape[-1] % TENSOR_CORES.m:
        return TENSOR_CORES.misfit(w_OSC.shape[-1])
    return "" if check_blocks(w_OSC, TENSOR_CORES).holds else "more than 2 of 4 are non-zero"
