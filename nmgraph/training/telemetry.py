"""What masks do while a model trains, as plain records at some of the steps.

A record looks at every weight a few times, so it costs a part of a step; it is made every so many steps. Nothing is
read on the host between two records, and once at each of them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmgraph.errors import TrainingError
from nmgraph.layers.masked import MaskedWeight
from nmgraph.layers.sharding import is_sharded, whole
from nmgraph.nm.grouping import canonical
from nmgraph.nm.packing import pack_bits, unpack_bits
from nmgraph.training.controller import Controller
from nmgraph.training.run_log import BINS, HIGH, LOW, JsonLines, LayerPicture, Picture, Record, Run
from nmgraph.training.sinks import Csv

_log = logging.getLogger("nmgraph")

Sink = Callable[[Run | Record | Picture], None]
_RECORDS, _PICTURES, _SIDE = 200, 8, 64
_WRAPPERS = {"module", "_orig_mod"}
_SELDOM = 50  # steps between two records, at least, unless it is said otherwise


class Telemetry:
    """Records what the masks do, as long as the controller is attached. Made by ``nmgraph.record``.

    Args:
        controller: of the run.
        sinks: what takes the entries.
        every: steps between two records; by default 200 records a run, and no more often than every 50 steps.

    Attributes:
        every: steps between two records.
    """

    def __init__(self, controller: Controller, sinks: Sequence[Sink], every: int | None = None) -> None:
        if not isinstance(controller, Controller):
            raise TrainingError(
                f"record takes the controller that nmgraph.attach gave, not a {type(controller).__name__}: "
                "controller = nmgraph.attach(model, optimizer, total_steps=...)."
            )
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise TrainingError(f"every={every!r} must be the number of steps between two records: 1 or more.")
        self.every = every or max(_SELDOM, controller.total_steps // _RECORDS)
        self._controller, self._sinks = controller, list(sinks)
        self._weights = {_name(name, weight): weight for name, weight in controller.weights.items()}
        # Gathering a sharded weight takes all processes; one of them writes.
        self._gathers = any(is_sharded(weight.raw) for weight in self._weights.values())
        self._writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self._noted: dict[str, tuple[Any, int]] = {}
        self._before: dict[str, Tensor] = {}
        self._begun, self._step = time.monotonic(), -1
        self._entry(_beginning(controller, self._weights, self.every))
        self._look(controller.step)
        self._handle = controller.observe(self._after_step)

    def note(self, **metrics: float | Tensor) -> None:
        """Add numbers of the loop, such as its loss, to the next record, which has their mean.

        Args:
            **metrics: single numbers; tensors are not read before the record.

        Raises:
            TrainingError: if one is no single real number.
        """
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                if value.numel() != 1 or value.is_complex():
                    raise TrainingError(
                        f"note({name}=...) takes one real number, not a tensor of {list(value.shape)} ({value.dtype})."
                    )
                value = value.detach().reshape(()).float()
            else:
                try:
                    value = float(value)
                except (TypeError, ValueError, OverflowError) as error:
                    raise TrainingError(f"note({name}=...) takes one real number, not {value!r:.80}.") from error
            total, count = self._noted.get(name, (0.0, 0))
            self._noted[name] = (total + value, count + 1)

    def close(self) -> None:
        """Record the last step, and stop recording."""
        self._handle.remove()
        if self._controller.step != self._step:
            self._look(self._controller.step)
        self._sinks.clear()

    def _after_step(self, step: int) -> None:
        if step % self.every == 0 or step == self._controller.total_steps:
            self._look(step)

    @torch.no_grad()
    def _look(self, step: int) -> None:
        if not (self._writes or self._gathers):
            return
        if step < self._step:  # an earlier state was loaded: what was recorded since is history
            run = _beginning(self._controller, self._weights, self.every)
            self._entry(replace(run, step=max(0, step - 1)))
            self._step = -1
        parts = _PICTURES * step // self._controller.total_steps
        pictured = self._step < 0 or parts > _PICTURES * self._step // self._controller.total_steps
        numbers: dict[str, dict[str, Tensor]] = {}
        pictures: dict[str, LayerPicture] = {}
        for name, weight in self._weights.items():
            mask = weight.mask()
            numbers[name] = self._numbers(name, weight, mask)
            if pictured:
                pictures[name] = take_picture(weight, mask)
        self._step = step
        layers = _read(numbers)
        metrics = {name: _finite(float(total) / count) for name, (total, count) in self._noted.items()}
        self._noted.clear()
        self._entry(Record(step, round(time.monotonic() - self._begun, 3), metrics, layers))
        if pictured:
            self._entry(Picture(step, pictures))

    def _numbers(self, name: str, weight: MaskedWeight, mask: Tensor) -> dict[str, Tensor]:
        magnitude = whole(weight.raw.detach()).abs().float()
        bits = pack_bits(mask.flatten())
        before = self._before.get(name, bits)
        # Of a weight that one machine cannot hold, one machine's accelerator should not hold the mask either.
        self._before[name] = bits.cpu() if is_sharded(weight.raw) else bits
        changed = unpack_bits(before.to(bits.device) ^ bits, mask.numel())
        found = {
            "kept": mask.float().mean(),
            "flipped": changed.float().mean(),
            "magnitude": (magnitude * mask).sum() / magnitude.sum(),
        }
        if weight.splits_backward:
            forward, backward = (whole(t).float() for t in weight.operand() if t is not None)
            found["input_gradient_lost"] = (forward - backward).square().sum() / forward.square().sum()
        return found | weight.gauges()

    def _entry(self, entry: Run | Record | Picture) -> None:
        if not self._writes:
            return
        for sink in list(self._sinks):
            try:
                sink(entry)
            except OSError as error:  # a full disk must not end a run
                _log.warning("the training log is not written any more: %s", error)
                self._sinks.remove(sink)


def _name(name: str, weight: MaskedWeight) -> str:
    """Name a weight as the model does that a wrapper - DDP, torch.compile - may be around."""
    around = name.removesuffix(weight.site).rstrip(".")
    return weight.site if set(around.split(".")) <= _WRAPPERS else name


def _beginning(controller: Controller, weights: Mapping[str, MaskedWeight], every: int) -> Run:
    from importlib.metadata import version

    layers = {
        name: {
            "method": weight.told.method.name,
            "options": weight.told.method.options(),
            "pattern": str(weight.told.pattern),
            "shape": list(weight.raw.shape),
            "axis": weight.told.reduction_axis,
            "splits_backward": weight.splits_backward,
        }
        for name, weight in weights.items()
    }
    versions = {"nmgraph": version("nmgraph"), "torch": str(torch.__version__)}
    return Run(controller.step, controller.total_steps, every, layers, versions)


def _read(numbers: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Read all numbers, those of one device at once."""
    on: dict[torch.device, list[tuple[str, str]]] = {}
    for name, found in numbers.items():
        for quantity, number in found.items():
            on.setdefault(number.device, []).append((name, quantity))
    layers: dict[str, dict[str, float]] = {name: {} for name in numbers}
    for places in on.values():
        values = torch.stack([numbers[name][quantity].float() for name, quantity in places]).tolist()
        for (name, quantity), value in zip(places, values, strict=True):
            if math.isfinite(value):  # a layer of zeros has no share of its magnitude
                layers[name][quantity] = float(f"{value:.6g}")
    return layers


def take_picture(weight: MaskedWeight, mask: Tensor) -> LayerPicture:
    """Show a layer as it is now, with its mask in the weight's shape."""
    w_OSC = canonical(whole(weight.raw.detach()), weight.told.reduction_axis)
    mask_OSC = canonical(mask, weight.told.reduction_axis)
    places = ((w_OSC.abs().float().log2().clamp(LOW, HIGH) - LOW) * (BINS / (HIGH - LOW))).clamp(max=BINS - 1)
    places = places.nan_to_num(BINS).long()
    # histc counts in float32, up to 2 ** 24, and has no deterministic kernel on GPUs.
    counts, kept = (t.flatten().bincount(minlength=BINS)[:BINS].tolist() for t in (places, places[mask_OSC]))
    corner = mask_OSC[:_SIDE, mask_OSC.shape[1] // 2, :_SIDE]
    return LayerPicture(corner.contiguous().cpu(), counts, kept)


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def find_sink(given: Any) -> Sink:
    """Make a sink of what was given: a file's name, or something to call.

    Raises:
        TrainingError: if it is neither.
        FileError: if the file cannot lie there.
    """
    if isinstance(given, (str, Path)):
        kinds: dict[str, Callable[[Path], Sink]] = {".jsonl": JsonLines, ".csv": Csv}
        make = kinds.get(Path(given).suffix.lower())
        if make is None:
            raise TrainingError(
                f"{given}: a training log is a .jsonl file, which `nmgraph report` reads, or a .csv file. For TensorBoard, "
                "give nmgraph.training.sinks.TensorBoard(...)."
            )
        return make(Path(given))
    if callable(given):
        return given  # type: ignore[no-any-return]
    raise TrainingError(f"records go to a file's name or to something callable, not to {given!r}.")
