"""Read ``.safetensors`` files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nmgraph.errors import FileError


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        FileError: if it is missing or damaged.
    """
    if not path.exists():
        raise FileError(f"{path} does not exist.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} can't be read as safetensors: {error}.") from error
