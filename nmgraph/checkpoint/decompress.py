"""Read a compressed ``model.safetensors`` with numpy alone: copy this file to where neither torch nor nmgraph is.

The container (https://huggingface.co/docs/safetensors): eight bytes, the length of the JSON that follows, lowest byte
first; the JSON, ``{name: {dtype, shape, data_offsets}}`` and ``__metadata__``; the data. The metadata's
``nmgraph.compressed`` says which tensors are the parts of a compressed weight:

    values       [O, S, G, N]: the kept weights of output channel O, kernel position S, block G
    positions    uint8: their places in the blocks, ceil(log2 M) bits each, lowest bit first, without gaps
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
           "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}  # fmt: skip


def decompress(path: str | Path) -> dict[str, Array]:
    """Give all tensors of a compressed file, dense, by their names in the ``state_dict``.

    Args:
        path: a ``model.safetensors`` of ``nmgraph export --safetensors``.

    Returns:
        Arrays of the stored dtypes; bfloat16, which numpy has not, as the same numbers in float32. What was not
        compressed is a read-only view of the file's content.

    Raises:
        ValueError: if the file is damaged, contradicts itself, or is of another version.
    """
    try:
        stored, metadata = _tensors(Path(path).read_bytes())
        header = json.loads(metadata["nmgraph.compressed"])
        if (header["format"], header["version"]) != ("nm-compressed", 1):
            raise ValueError(f"format {header['format']!r}, version {header['version']!r} is not known here")
        parts = {weight[part] for weight in header["weights"].values() for part in ("values", "positions")}
        dense = {name: array for name, (_, array) in stored.items() if name not in parts}
        if len(parts) != 2 * len(header["weights"]) or dense.keys() & header["weights"].keys():
            raise ValueError("a weight is stored twice, or two in the same tensor")
        dense |= {name: _weight(stored, **weight) for name, weight in header["weights"].items()}
        return dense | {name: dense[kept] for name, kept in header["shared"].items()}
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no compressed file of nmgraph: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _tensors(content: bytes) -> tuple[dict[str, tuple[str, Array]], dict[str, str]]:
    """Read a container: dtype and array of every tensor, and the metadata."""
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8:
        raise ValueError("the file is truncated, or no safetensors file")
    header, data = json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, told in header.items():
        begin, end = told["data_offsets"]
        dtype, shape = np.dtype(_DTYPES[told["dtype"]]), tuple(told["shape"])
        if not (0 <= begin <= end <= len(data) and math.prod(shape) * dtype.itemsize == end - begin):
            raise ValueError(f"{name} does not lie in the file as its header says; it is truncated or damaged")
        array = np.frombuffer(data[begin:end], dtype).reshape(shape)
        if told["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = told["dtype"], array
    return tensors, metadata


def _weight(
    stored: dict[str, tuple[str, Array]], *, pattern: str, shape: list[int], dtype: str, axis: int | str, values: str,
    positions: str,
) -> Array:  # fmt: skip
    n, m = map(int, pattern.split(":"))
    (kind, kept), (_, packed) = stored[values], stored[positions]
    if axis == "flat":
        outer, channels = [shape[0]], math.prod(shape[1:])
    elif axis in (-1, -2):  # a stack of matrices, the second kind stored transposed
        outer, channels = [shape[-3 - int(axis)], *shape[:-2]], shape[int(axis)]
    else:
        outer, channels = [size for place, size in enumerate(shape) if place != axis], shape[int(axis)]
    bits = (m - 1).bit_length()
    # What the header claims is held to the tensors, before anything is made of it.
    if not (1 <= n < m <= 32 and kind == dtype and channels % m == 0 and kept.size):
        raise ValueError(f"{values} is not what the header says")
    if kept.shape != (outer[0], math.prod(outer[1:]), channels // m, n):
        raise ValueError(f"{values} does not make a weight of the shape {shape}")
    if packed.dtype != np.uint8 or packed.shape != (-(-kept.size * bits // 8),):
        raise ValueError(f"{positions} does not fit {values}")
    flags = np.unpackbits(packed, count=kept.size * bits, bitorder="little").reshape(-1, bits)
    places = (flags << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8).reshape(kept.shape)
    if places.max() >= m or not (places[..., 1:] > places[..., :-1]).all():
        raise ValueError(f"{positions} is damaged: the positions of a block do not ascend below {m}")
    dense = np.zeros((*kept.shape[:3], m), kept.dtype)
    np.put_along_axis(dense, places.astype(np.intp), kept, -1)
    if axis == "flat":
        return dense.reshape(shape)
    if axis in (-1, -2):
        stacked = np.moveaxis(dense.reshape(*outer, channels), 0, -2)
        return np.ascontiguousarray(stacked if axis == -1 else stacked.swapaxes(-1, -2))
    return np.ascontiguousarray(np.moveaxis(dense.reshape(*outer, channels), -1, int(axis)))
