"""Read tensors that a model is run on: ``.pt``, ``.safetensors`` and ``.npz`` files; nothing in them is code."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nmgraph.checkpoint.tensors import load_safetensors
from nmgraph.checkpoint.trusted import load_trusted
from nmgraph.errors import FileError, first_line

# What numpy raises for a damaged archive, for arrays of objects or texts, and for a size that nothing could hold.
_NPZ_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, TypeError, MemoryError, NotImplementedError,
    RuntimeError,
)  # fmt: skip


def read_data(path: Path) -> dict[str, Tensor]:
    """Read named tensors; a single one without a name is called ``input``.

    Raises:
        FileError: if the file is missing or damaged, or holds anything else.
    """
    if not path.is_file():
        raise FileError(f"{path} {'is not a file' if path.exists() else 'does not exist'}.")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".safetensors":
        return load_safetensors(path).tensors
    content = load_trusted(path, str(path))
    if isinstance(content, Tensor):
        return {"input": content}
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        found = type(content).__name__
        if isinstance(content, Mapping):
            other = next(
                (f"{k!r:.80}, a {type(v).__name__}" for k, v in content.items() if not isinstance(v, Tensor)), "nothing"
            )
            found = f"{found} with {other}"
        raise FileError(
            f"{path} holds a {found}. As data it has to hold a tensor, or a dict of tensors by the names of the model's "
            'arguments, and "labels" if there are any.'
        )
    return {str(name): tensor for name, tensor in content.items()}


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as opened:
            content = np.load(opened, allow_pickle=False)
            arrays = {"input": content} if isinstance(content, np.ndarray) else dict(content)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except _NPZ_ERRORS as error:
        raise FileError(
            f"{path} can't be read as arrays of numbers: {first_line(error)}. Write it with numpy.savez."
        ) from error
