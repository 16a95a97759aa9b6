"""Read what people have as a dense model.

A pickled module; a state_dict, or safetensors, and what makes its model; a name that timm or torchvision knows; a
Hugging Face directory; an exported program. What a file is, is told by its content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmgraph.checkpoint.exported_program import is_exported, open_exported
from nmgraph.checkpoint.factory import call_factory, load_weights
from nmgraph.checkpoint.foreign_files import is_safetensors
from nmgraph.checkpoint.hugging_face import open_hugging_face
from nmgraph.checkpoint.named_models import NamedModel
from nmgraph.checkpoint.nm_file import is_nm_file
from nmgraph.checkpoint.tensors import load_safetensors
from nmgraph.checkpoint.trusted import load_trusted, members_of
from nmgraph.errors import FileError

_NESTED = 3  # DDP around torch.compile around a Lightning module


@dataclass(frozen=True)
class Dense:
    """A dense model, and where it is from.

    Attributes:
        model: to convert.
        factory: what makes it again without its weights, if it was made by a name or from an exported program.
        notes: what a person should know of how it was read.
    """

    model: nn.Module
    factory: str | None = None
    notes: tuple[str, ...] = ()


def open_dense(path: str | Path, *, factory: str | None = None, trust: Sequence[str] = ()) -> nn.Module:
    """Give the model that :func:`read_dense` reads."""
    return read_dense(path, factory=factory, trust=trust).model


def read_dense(path: str | Path, *, factory: str | None = None, trust: Sequence[str] = ()) -> Dense:
    """Read what people have as a model.

    Args:
        path: a file, a Hugging Face directory, or a name: ``timm:resnet50``, ``torchvision:resnet18,num_classes=10``.
        factory: for weights alone, what makes their model: a name as above, ``pkg.mod:function``, or a path.
        trust: packages to trust besides the usual; ``torch.export`` for exported programs.

    Raises:
        FileError: if it is none of these, or weights come without what makes their model.
    """
    text, path = str(path), Path(path)
    if NamedModel.names(text) and not path.exists():
        _require_no_factory(text, "names a whole model", factory)
        named = NamedModel.parse(text)
        return Dense(named.make(), str(named), (f"{named} was made with random weights; no file was read.",))
    if path.is_dir():
        _require_no_factory(text, "holds a whole model", factory)
        model, notes = open_hugging_face(path)
        return Dense(model, None, notes)
    if is_exported(members_of(path)):
        _require_no_factory(text, "holds a whole program", factory)
        return Dense(open_exported(path, trust), text)
    content = _weights_alone(path) if factory else None
    content = load_trusted(path, text, trust) if content is None else content
    if is_nm_file(content):
        raise FileError(f"{path} is converted already. Train it, or export it with `nmgraph export {path}`.")
    if isinstance(content, nn.Module):
        _require_no_factory(text, f"holds a whole {type(content).__name__}", factory)
        return Dense(content)
    state = state_of(content, path)
    if factory is None:
        raise FileError(
            f"{path} holds a state_dict ({len(state)} tensors) without its model. Say what makes the model: "
            "--model package.module:function, timm:NAME or torchvision:NAME."
        )
    return _filled(path, state, factory, trust)


def make_model(text: str, trust: Sequence[str] = ()) -> nn.Module:
    """Make the dense model that ``--model`` names: by a library's name, a function, or a path.

    Raises:
        FileError: if there is no such model.
    """
    if Path(text).exists() or text.endswith(".pt2"):
        return open_dense(text, trust=trust)
    return call_factory(text)


def default_output(model: Path) -> Path:
    """Give where the converted model goes: beside a file or directory, or for a name into the current directory."""
    if NamedModel.names(str(model)) and not model.exists():
        return Path(f"{NamedModel.parse(str(model)).name}.nm.pt")
    if model.is_dir():
        model = model if model.name not in ("", "..") else model.resolve()
        return model.parent / f"{model.name or 'model'}.nm.pt"
    return model.with_name(f"{model.stem}.nm.pt")


def state_of(content: Any, path: Path) -> dict[str, Any]:
    """Find the state_dict in loaded content, also under the usual names in a training checkpoint.

    Raises:
        FileError: if there is none.
    """
    if isinstance(content, Mapping):
        for candidate in (*(content.get(key) for key in ("state_dict", "model", "model_state_dict")), content):
            if isinstance(candidate, Mapping) and any(isinstance(v, torch.Tensor) for v in candidate.values()):
                return dict(candidate)
        averages = [str(key) for key, value in content.items() if "ema" in str(key) and isinstance(value, Mapping)]
        if averages:
            raise FileError(
                f"{path} holds a state_dict only under {', '.join(averages)}. Save the one you mean by itself: "
                f"torch.save(checkpoint[{averages[0]!r}], ...)."
            )
    raise FileError(f"{path} holds a {type(content).__name__}: neither a module nor a state_dict.")


def fitting_keys(state: Mapping[str, Any], wanted: set[str]) -> tuple[dict[str, Any], str]:
    """Take off what wrappers put before a model's keys - ``module.``, ``_orig_mod.``, ``model.`` - if then all fit.

    Args:
        state: a state_dict.
        wanted: the model's own keys.

    Returns:
        The state_dict with the model's keys, and what was taken off; as it was, with nothing, if that does not help.
    """
    # AveragedModel counts beside its module.
    stripped, prefix = {k: v for k, v in state.items() if k != "n_averaged" or k in wanted}, ""
    for _ in range(_NESTED):
        if stripped.keys() == wanted:
            break
        first = {key.partition(".")[0] for key in stripped}
        if len(first) != 1 or not all("." in key for key in stripped):
            break
        prefix += f"{first.pop()}."
        stripped = {key.partition(".")[2]: value for key, value in stripped.items()}
    return (stripped, prefix) if prefix and stripped.keys() == wanted else (dict(state), "")


def _filled(path: Path, state: dict[str, Any], factory: str, trust: Sequence[str]) -> Dense:
    """Make the model of a state_dict, and load it."""
    model = make_model(factory, trust)
    fitting, prefix = fitting_keys(state, set(model.state_dict()))
    if NamedModel.names(factory) and not Path(factory).exists():
        named, model = NamedModel.parse(factory).make_for(fitting, model)
        factory = str(named)
    load_weights(model, fitting, str(path))
    notes = (f"All keys of {path.name} begin with {prefix!r}, which was taken off.",) if prefix else ()
    return Dense(model, factory, notes)


def _weights_alone(path: Path) -> dict[str, Tensor] | None:
    """Read a safetensors file, if it is one."""
    try:
        with path.open("rb") as opened:
            start = opened.read(16)
    except OSError:
        return None  # said by whoever reads it next
    if not is_safetensors(start):
        return None
    found = load_safetensors(path)
    for name, what in found.damaged.items():
        raise FileError(f"{path} is damaged: {name}: {what}. Copy it again, or export again.")
    return found.tensors


def _require_no_factory(name: str, what: str, factory: str | None) -> None:
    if factory is not None:
        raise FileError(f"{name} {what}; leave --model {factory} away.")
