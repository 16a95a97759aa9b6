"""Read what people have as a dense model: a pickled module, or a state_dict and what makes its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmgraph.checkpoint.factory import call_factory, load_weights
from nmgraph.checkpoint.nm_file import is_nm_file
from nmgraph.checkpoint.trusted import load_trusted
from nmgraph.errors import FileError


def open_dense(path: str | Path, *, factory: str | None = None, trust: Sequence[str] = ()) -> nn.Module:
    """Read what people have as a model: a pickled module, or a state_dict and the factory of its model.

    Raises:
        FileError: if the file is neither, or a state_dict comes without a factory.
    """
    content = load_trusted(Path(path), str(path), trust)
    if is_nm_file(content):
        raise FileError(f"{path} is converted already. Train it, or export it with `nmgraph export {path}`.")
    if isinstance(content, nn.Module):
        if factory is not None:
            raise FileError(f"{path} holds a whole {type(content).__name__}; leave --model {factory} away.")
        return content
    state = state_of(content, Path(path))
    if factory is None:
        raise FileError(
            f"{path} holds a state_dict ({len(state)} tensors) without its model. Say what makes the model: --model package.module:function."
        )
    model = call_factory(factory)
    load_weights(model, state, str(path))
    return model


def state_of(content: Any, path: Path) -> dict[str, Any]:
    """Find the state_dict in loaded content, also under the usual names in a training checkpoint.

    Raises:
        FileError: if there is none.
    """
    if isinstance(content, Mapping):
        for candidate in (*(content.get(key) for key in ("state_dict", "model", "model_state_dict")), content):
            if isinstance(candidate, Mapping) and any(isinstance(v, torch.Tensor) for v in candidate.values()):
                return dict(candidate)
    raise FileError(f"{path} holds a {type(content).__name__}: neither a module nor a state_dict.")
