"""Read ``.safetensors`` files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nmgraph.errors import FileError
from nmgraph.passes.manifest import MANIFEST_KEY, Manifest


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], Manifest | None]:
    """Read all tensors of a file, and the manifest if an export wrote one into it.

    Raises:
        FileError: if it is missing or damaged.
    """
    if not path.exists():
        raise FileError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            text = (opened.metadata() or {}).get(MANIFEST_KEY)
            return tensors, Manifest.from_json(text) if text else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} can't be read as safetensors: {error}.") from error
