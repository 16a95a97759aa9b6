"""Store of every converted weight only what it keeps: its values, and where in their blocks they lie.

The tensors and the schema header of a compressed file, whatever container they are put into. The header is JSON:

    format    "nm-compressed"
    version   1
    weights   {name: {pattern, shape, dtype, axis, values, positions}}
    shared    {name: the name under which the same tensor is stored}

``shape`` is the dense weight's, ``dtype`` one of F16, BF16, F32 and F64, ``axis`` the reduction axis, counted from the
end for a stack of matrices, or "flat".
``values`` and ``positions`` name two tensors: ``[O, S, G, N]`` of that dtype, and a stream of bits in uint8, as
:mod:`nmgraph.nm.packing` lays them out for the weight read as ``w_OSC``. All other tensors are stored as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nmgraph.errors import ExportError, PatternError
from nmgraph.nm.grouping import Axis, canonical, canonical_shape, is_axis, restore
from nmgraph.nm.masks import check_blocks
from nmgraph.nm.packing import compress, decompress, packed_bytes
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.manifest import Manifest
from nmgraph.passes.structure import parameter_of

SCHEMA_KEY = "nmgraph.compressed"  # in the metadata of files
FORMAT = "nm-compressed"
VERSION = 1
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_AXES = 5  # of a three-dimensional convolution


@dataclass(frozen=True)
class CompressedWeight:
    """How one weight is stored.

    Attributes:
        pattern: N:M.
        shape: of the dense weight.
        dtype: name of its dtype, as safetensors files have it.
        axis: its reduction axis, or ``flat``.
        values: name of the tensor of kept values.
        positions: name of the tensor of packed positions.

    Raises:
        ValueError: if no weight could be like that.
    """

    pattern: Pattern
    shape: tuple[int, ...]
    dtype: str
    axis: Axis
    values: str
    positions: str

    def __post_init__(self) -> None:
        if not all(type(size) is int and size > 0 for size in self.shape) or not 2 <= len(self.shape) <= _MOST_AXES:
            raise ValueError(f"{list(self.shape)[:8]} is no weight's shape")
        if not is_axis(self.axis):
            raise ValueError(f"there is no reduction axis {self.axis!r}")
        if self.axis in (-1, -2) and len(self.shape) < 3:
            raise ValueError(f"{list(self.shape)} is no stack of matrices")
        if self.dtype not in DTYPES:
            raise ValueError(f"there is no weight of dtype {self.dtype!r}")
        if not (isinstance(self.values, str) and isinstance(self.positions, str)):
            raise ValueError("values and positions are not named")
        channels = canonical_shape(self.shape, self.axis)[-1]
        if not self.pattern.divides(channels):
            raise ValueError(self.pattern.misfit(channels))

    @property
    def values_shape(self) -> tuple[int, int, int, int]:
        """Shape of the kept values, ``[O, S, G, N]``."""
        outputs, kernel, channels = canonical_shape(self.shape, self.axis)
        return outputs, kernel, channels // self.pattern.m, self.pattern.n

    @property
    def positions_shape(self) -> tuple[int]:
        """Shape of the packed positions."""
        outputs, kernel, groups, n = self.values_shape
        return (packed_bytes(outputs * kernel * groups * n, self.pattern.m),)

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Make the dense weight again.

        Raises:
            PatternError: if its positions are damaged, naming the first block where they are.
        """
        w_OSC = decompress(tensors[self.values], tensors[self.positions], self.pattern)
        return restore(w_OSC, self.shape, self.axis).contiguous()


@dataclass(frozen=True)
class Schema:
    """What a file holds besides ordinary tensors.

    Attributes:
        weights: the compressed ones, by their names in the ``state_dict``.
        shared: names that are no tensors of their own, with the name of the same tensor.
    """

    weights: dict[str, CompressedWeight]
    shared: dict[str, str]

    def to_json(self) -> str:
        """Give the header, which :meth:`from_json` reads back."""
        weights = {name: asdict(w) | {"pattern": str(w.pattern)} for name, w in self.weights.items()}
        return json.dumps({"format": FORMAT, "version": VERSION, "weights": weights, "shared": self.shared})

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Read a header.

        Raises:
            ValueError: if it is damaged or of another version, in words.
        """
        header = json.loads(text)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"its header {SCHEMA_KEY} is not of the format {FORMAT}")
        if header.get("version") != VERSION:
            raise ValueError(
                f"it has format version {header.get('version')!r:.20}, and this nmgraph reads version {VERSION}"
            )
        weights, shared = header.get("weights"), header.get("shared")
        if not (isinstance(weights, dict) and isinstance(shared, dict)):
            raise ValueError(f"its header {SCHEMA_KEY} does not list weights and shared tensors")
        return cls({name: _weight(name, values) for name, values in weights.items()}, shared)


def _weight(name: str, values: Any) -> CompressedWeight:
    fields = CompressedWeight.__dataclass_fields__.keys()
    if not isinstance(values, dict) or values.keys() != fields or not isinstance(values["shape"], list):
        raise ValueError(f"its header does not describe {name!r:.80} by {', '.join(fields)}")
    try:
        return CompressedWeight(
            **values | {"pattern": Pattern.parse(values["pattern"]), "shape": tuple(values["shape"])}
        )
    except ValueError as error:
        raise ValueError(f"its header says of {name!r:.80} what can't be: {error}") from error


@dataclass(frozen=True)
class Sizes:
    """How large the compressed weights are.

    Attributes:
        weights: how many there are.
        dense_bytes: what they would take with their zeros.
        compressed_bytes: what their values and positions take.
    """

    weights: int
    dense_bytes: int
    compressed_bytes: int

    @property
    def ratio(self) -> float:
        """Compressed bytes for one dense byte; 1 if there are no weights."""
        return self.compressed_bytes / self.dense_bytes if self.dense_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        return f"{self.compressed_bytes:,} bytes in place of {self.dense_bytes:,} for {self.weights} weights"


def compress_state(state: Mapping[str, Any], manifest: Manifest) -> tuple[dict[str, Tensor], Schema, Sizes]:
    """Compress the converted weights of a finalized model.

    A weight that does not keep to its pattern stays dense, for whoever verifies the file to find.

    Args:
        state: its ``state_dict``, on the CPU.
        manifest: of its conversion.

    Returns:
        Contiguous tensors without shared memory, the schema, and the sizes of what was compressed.

    Raises:
        ExportError: if the state holds something else than tensors.
    """
    entries = {parameter_of(entry.name, state): entry for entry in manifest.converted}
    stored, shared = _each_once(state, entries)
    weights, tensors, dense_bytes = {}, {}, 0
    for name, tensor in stored.items():
        entry = entries.get(name)
        found = None if entry is None else _compressed(name, tensor, Pattern.parse(entry.pattern), entry.axis)
        if found is None:
            tensors[name] = tensor
        else:
            weights[name], parts = found
            tensors.update(parts)
            dense_bytes += tensor.nbytes
    sizes = Sizes(
        len(weights), dense_bytes, sum(tensors[n].nbytes for w in weights.values() for n in (w.values, w.positions))
    )
    return _apart(tensors), Schema(weights, shared), sizes


def _compressed(
    name: str, tensor: Tensor, pattern: Pattern, axis: Axis
) -> tuple[CompressedWeight, dict[str, Tensor]] | None:
    if tensor.dtype not in _NAMES or not tensor.numel():
        return None
    w_OSC = canonical(tensor, axis)
    try:
        values, positions = compress(w_OSC, pattern)
    except PatternError:
        if not pattern.divides(w_OSC.shape[-1]) or not check_blocks(w_OSC, pattern).holds:
            return None
        values, positions = compress(w_OSC + 0.0, pattern)  # the rest were negative zeros
    weight = CompressedWeight(
        pattern, tuple(tensor.shape), _NAMES[tensor.dtype], axis, f"{name}.values", f"{name}.positions"
    )
    return weight, {weight.values: values, weight.positions: positions}


def _each_once(state: Mapping[str, Any], first: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find tensors that stand under several names, and keep one of these, a weight's in ``first`` if there is one."""
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name in sorted(state, key=lambda name: name not in first):
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise ExportError(
                f"{name} is a {type(tensor).__name__}, and a safetensors file holds tensors only. Export without --safetensors."
            )
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        if names.setdefault(place, name) == name:
            stored[name] = tensor
        else:
            shared[name] = names[place]
    return stored, shared


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy what is a view of another's memory, or not contiguous: safetensors stores neither."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        overlaps = memory in seen and tensor.numel() > 0
        seen.add(memory)
        copied = overlaps or not tensor.is_contiguous()
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if copied else tensor
    return apart
