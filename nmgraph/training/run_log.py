"""The log of a training run: a text file with one JSON object a line, which grows while the run goes on.

Each line has a ``kind``:

    run       where a run begins, or goes on after a stop: total steps, layers with method, pattern and shape
    record    numbers after some step: those of the loop (its loss), and of every layer, by the names in QUANTITIES
    picture   now and then, of every layer: a corner of its mask, and how its magnitudes are distributed

A file is only ever appended to. What lies behind the step at which a later run begins is history, and is not read.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmgraph.errors import FileError
from nmgraph.nm.packing import pack_bits, unpack_bits

_log = logging.getLogger("nmgraph")

FORMAT = 1
QUANTITIES = {
    "kept": "share of the weights in the forward mask",
    "flipped": "share of the weights whose place in the mask changed since the record before",
    "magnitude": "share of the weights' absolute sum that the mask keeps",
    "input_gradient_lost": "share of the input gradient's energy that the backward mask takes away, for white output gradients",
    "frozen": "share of the blocks that would keep their mask in the next adaption",
    "live_combinations": "combinations of a block that are left",
}
_NO_LINE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
_BEGINNING = '{"kind": "run"'
LOW, HIGH, BINS = -20.0, 4.0, 48  # of log2(|weight|); what lies beyond is counted at the ends


@dataclass(frozen=True)
class Run:
    """Where a run begins.

    Attributes:
        step: steps done before.
        total_steps: of the whole run.
        every: steps between two records.
        layers: by site: method, options, pattern, shape, reduction axis, whether the input gradient has a weight of its own.
        versions: of nmgraph and torch.
    """

    step: int
    total_steps: int
    every: int
    layers: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """Numbers after a step.

    Attributes:
        step: steps done.
        seconds: since this run began.
        metrics: what the loop noted, each the mean since the record before; None where that is not finite.
        layers: by site, numbers by the names in ``QUANTITIES``.
    """

    step: int
    seconds: float
    metrics: Mapping[str, float | None]
    layers: Mapping[str, Mapping[str, float]]

    def mean(self, quantity: str) -> float | None:
        """Give the mean of a quantity over the layers that have it."""
        values = [numbers[quantity] for numbers in self.layers.values() if quantity in numbers]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class LayerPicture:
    """What a layer looks like.

    Attributes:
        mask: bool ``[rows, columns]``: the first output channels by the first weights along the reduction axis, at the
            middle kernel position.
        magnitudes: how many weights lie in each of the ``BINS`` steps of log2(abs(weight)) from ``LOW`` to ``HIGH``.
        kept: the same of the weights that the mask keeps.
    """

    mask: Tensor
    magnitudes: Sequence[int]
    kept: Sequence[int]


@dataclass(frozen=True)
class Picture:
    """What the layers look like after a step."""

    step: int
    layers: Mapping[str, LayerPicture]


@dataclass(frozen=True)
class RunLog:
    """What a log file holds of its last run, which may have gone on after stops.

    Attributes:
        run: its last beginning.
        records: by rising steps.
        pictures: by rising steps.
    """

    run: Run
    records: Sequence[Record] = field(default_factory=list)
    pictures: Sequence[Picture] = field(default_factory=list)

    def of_part(self, prefix: str) -> RunLog:
        """Give the log of a part of the model, such as the network in a trainer's module, with the part's own names."""

        def own(layers: Mapping[str, Any]) -> dict[str, Any]:
            return {n.removeprefix(prefix): layer for n, layer in layers.items() if n.startswith(prefix)}

        return RunLog(
            replace(self.run, layers=own(self.run.layers)),
            [replace(record, layers=own(record.layers)) for record in self.records],
            [replace(picture, layers=own(picture.layers)) for picture in self.pictures],
        )

    @classmethod
    def read(cls, path: str | Path) -> RunLog:
        """Read a log file, also of a run that is still going on, or was killed while it wrote.

        Raises:
            FileError: if it cannot be read, naming the line.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path} cannot be read as a training log: {error}.") from error
        read: list[Run | Record | Picture] = []
        for number, line in enumerate(lines, 1):
            try:
                read.append(_from_line(line))
            except _NO_LINE as error:
                # Half of a line: it is being written, or the run was killed, and perhaps went on.
                if number == len(lines) or lines[number].startswith(_BEGINNING):
                    _log.warning("%s: line %d is not complete, and is left out.", path, number)
                    continue
                raise FileError(
                    f"{path}: line {number} is no line of a training log, as nmgraph.record writes it ({error})."
                ) from error
        return cls._assembled(path, read)

    @classmethod
    def _assembled(cls, path: Path, read: Sequence[Run | Record | Picture]) -> RunLog:
        run: Run | None = None
        records: list[Record] = []
        pictures: list[Picture] = []
        last = {Record: -1, Picture: -1}
        for entry in read:
            if isinstance(entry, Run):
                run = entry
                records = [r for r in records if r.step <= run.step and run.step > 0]
                pictures = [p for p in pictures if p.step <= run.step and run.step > 0]
                last = dict.fromkeys(last, run.step - 1)  # its first is of the step at which it begins
                continue
            if entry.step <= last[type(entry)]:
                raise FileError(
                    f"{path}: a {type(entry).__name__.lower()} of step {entry.step} comes after one of step {last[type(entry)]}. "
                    "Two runs wrote into one log; give each its own."
                )
            last[type(entry)] = entry.step
            if isinstance(entry, Record):
                records.append(entry)
            else:
                pictures.append(entry)
        if run is None:
            raise FileError(
                f"{path} is no training log: it does not say where a run begins. nmgraph.record writes one."
            )
        return cls(run, records, pictures)


class JsonLines:
    """Appends to a log file, line by line.

    Args:
        path: the file; its directory has to exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        require_directory(self.path)

    def __call__(self, entry: Run | Record | Picture) -> None:
        """Append one entry; what stands there stays."""
        begun = b"" if _ends_with_newline(self.path) else b"\n"  # a run was killed while it wrote
        with self.path.open("ab") as file:
            file.write(begun + to_line(entry).encode() + b"\n")


def to_line(entry: Run | Record | Picture) -> str:
    """Write an entry as one line of JSON."""
    kind = {Run: "run", Record: "record", Picture: "picture"}[type(entry)]
    values: dict[str, Any] = {"kind": kind}
    if isinstance(entry, Picture):
        layers = {name: _picture_values(layer) for name, layer in entry.layers.items()}
        values |= {"step": entry.step, "layers": layers}
    else:
        values |= ({"format": FORMAT} if kind == "run" else {}) | asdict(entry)
    return json.dumps(values, allow_nan=False, default=str)


def _from_line(line: str) -> Run | Record | Picture:
    values = json.loads(line)
    kind = values.pop("kind")
    if kind == "run":
        version = values.pop("format")
        if version > FORMAT:
            raise ValueError(f"format {version} is newer than this nmgraph, which reads {FORMAT}")
        run = Run(**values)
        _require(all(_is_count(n) for n in (run.step, run.total_steps, run.every)), "steps are no whole numbers")
        _require(run.total_steps > 0, "a run has no steps")
        keys = {"method": str, "pattern": str, "options": dict, "shape": list, "splits_backward": bool}
        told = [type(layer[key]) is kind for layer in run.layers.values() for key, kind in keys.items()]
        _require(all(told), "a layer is not described")
        _require(isinstance(run.versions, dict), "versions have no names")
        return run
    if kind == "record":
        record = Record(**values)
        numbers = [record.seconds, *(v for v in record.metrics.values() if v is not None)]
        numbers += [v for layer in record.layers.values() for v in layer.values()]
        _require(_is_count(record.step), "the step is no whole number")
        _require(all(type(n) in (int, float) and math.isfinite(n) for n in numbers), "what is recorded are no numbers")
        return record
    if kind == "picture":
        _require(_is_count(values["step"]), "the step is no whole number")
        return Picture(values["step"], {name: _to_picture(layer) for name, layer in values["layers"].items()})
    raise ValueError(f"there is no kind {kind!r}")


def _picture_values(layer: LayerPicture) -> dict[str, Any]:
    bits = pack_bits(layer.mask.flatten()).cpu().numpy().tobytes()
    return {
        "mask": {"shape": list(layer.mask.shape), "bits": base64.b64encode(bits).decode()},
        "magnitudes": list(layer.magnitudes),
        "kept": list(layer.kept),
    }


def _to_picture(values: Mapping[str, Any]) -> LayerPicture:
    rows, columns = values["mask"]["shape"]
    counts = (values["magnitudes"], values["kept"])
    _require(all(len(c) == BINS and all(map(_is_count, c)) for c in counts), f"a histogram has no {BINS} counts")
    bits = bytearray(base64.b64decode(values["mask"]["bits"]))
    whole = _is_count(rows) and _is_count(columns) and 0 < rows * columns <= 8 * len(bits)
    _require(whole, f"a mask of {rows} by {columns} is not there")
    packed = torch.frombuffer(bits, dtype=torch.uint8)
    return LayerPicture(
        unpack_bits(packed, rows * columns).reshape(rows, columns), values["magnitudes"], values["kept"]
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _ends_with_newline(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def require_directory(path: Path) -> None:
    """Make sure that a file can lie there.

    Raises:
        FileError: if it cannot.
    """
    if path.is_dir():
        raise FileError(f"{path} is a directory; give the name of a file.")
    if not path.parent.is_dir():
        raise FileError(f"{path.parent} is no directory, so {path.name} cannot be written there. Make it first.")
