"""Write a finalized Hugging Face model as the directory that ``from_pretrained`` reads, and read it back."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmgraph.checkpoint.hugging_face import MANIFEST_FILE, open_hugging_face, quiet
from nmgraph.errors import ExportError, FileError, first_line
from nmgraph.passes.manifest import Manifest


@dataclass(frozen=True)
class ReadBack:
    """What ``from_pretrained`` made of the written directory.

    Attributes:
        model: the class it gave.
        tensors: how many were compared.
        differing: names of those that are not bit-equal to the model's, or missing.
        error: why it could not be read, if so.
    """

    model: str
    tensors: int
    differing: tuple[str, ...] = ()
    error: str = ""

    @property
    def holds(self) -> bool:
        """Tell whether everything came back as it was."""
        return not (self.differing or self.error)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {"holds": self.holds, **asdict(self)}

    def __str__(self) -> str:
        if self.error:
            return self.error
        if self.differing:
            return f"{len(self.differing)} of {self.tensors} tensors came back changed: {', '.join(self.differing[:4])}"
        return f"from_pretrained gives {self.model} back, {self.tensors} tensors bit-equal"


def require_hugging_face(model: nn.Module) -> None:
    """Refuse what has no such form.

    Raises:
        ExportError: if the model is none of transformers.
    """
    if not (hasattr(model, "save_pretrained") and hasattr(model, "config")):
        raise ExportError(
            f"{type(model).__name__} is no Hugging Face model, so --hf (hf=True) can't write it. Write its weights with "
            "--safetensors."
        )


def write_hugging_face(model: Any, directory: Path, manifest: Manifest) -> ReadBack:
    """Write a finalized model, and compare what is read from the files with it.

    Args:
        model: of transformers, on the CPU; its root gets a copy of its configuration, which writing changes.
        directory: to make.
        manifest: of the conversion, written beside for ``verify``.

    Raises:
        ExportError: if transformers can't write it.
    """
    model.config = copy.deepcopy(model.config)
    try:
        with quiet():
            model.save_pretrained(directory)
    except Exception as error:
        # The model's class is foreign code, with its own ideas of what can be saved.
        raise ExportError(
            f"transformers can't write {type(model).__name__}: {type(error).__name__}: {first_line(error)}. Export "
            "without --hf."
        ) from error
    (directory / MANIFEST_FILE).write_text(manifest.to_json() + "\n")
    wanted = _tensors(model)
    try:
        again, _ = open_hugging_face(directory)
    except FileError as error:
        return ReadBack(type(model).__name__, len(wanted), error=str(error).replace(str(directory), directory.name))
    found = _tensors(again)
    names = sorted(wanted.keys() | found.keys())
    differing = tuple(name for name in names if not _equal(wanted.get(name), found.get(name)))
    return ReadBack(type(again).__name__, len(names), differing)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)
