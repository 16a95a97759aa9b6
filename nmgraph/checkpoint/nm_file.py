"""The ``.nm.pt`` file: a converted model, ready to train on.

A ``torch.save`` archive of plain values and tensors:

    format       "nmgraph"
    version      1
    factory      what makes the dense model: "timm:NAME", "torchvision:NAME", "pkg.mod:function" or "FILE.pt2"; or None
    module       uint8 pickle of the dense module with empty tensors, or None
    recipes      {site: {method, options, pattern, reduction_axis}}
    manifest     JSON text
    state        the converted model's state_dict

Loading makes the dense module, converts the recorded sites again and loads the state strictly: no class or code of
ours is ever unpickled, and a GraphModule, whose pickle runs source code, never stored. The module is pickled with
one-element tensors in place of its weights, so that it costs nothing beside the state, and keeps which are tied.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmgraph.checkpoint.exported_program import TRUST
from nmgraph.checkpoint.factory import load_weights, require_same_shapes
from nmgraph.checkpoint.named_models import NamedModel
from nmgraph.checkpoint.tensors import read_manifest
from nmgraph.checkpoint.trusted import load_trusted
from nmgraph.errors import FileError, first_line
from nmgraph.files import written_atomically
from nmgraph.layers.masked import buffer_names, class_name, masked_weights, unmask_all
from nmgraph.layers.recipe import Recipe
from nmgraph.nm.grouping import is_axis
from nmgraph.passes.manifest import find_manifest, write_manifest
from nmgraph.passes.rewrite import rewrite
from nmgraph.passes.structure import copy_structure, duplicate, owner_of, parameter_of

FORMAT = "nmgraph"
VERSION = 1


def is_nm_file(content: Any) -> bool:
    """Tell whether loaded content is that of a ``.nm.pt`` file."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def write_nm_file(model: nn.Module, path: Path, factory: str | None = None) -> None:
    """Write a converted model.

    Args:
        model: a converted module.
        path: where to; replaced in one step.
        factory: what makes the dense model, instead of storing its classes.

    Raises:
        FileError: if the model is no converted one, is a graph, or holds what cannot be pickled.
    """
    weights, manifest = masked_weights(model), find_manifest(model)
    if not weights or manifest is None:
        raise FileError(f"{type(model).__name__} is not a converted model; save it with torch.save.")
    if isinstance(model, fx.GraphModule) and not str(factory).endswith(".pt2"):
        raise FileError(
            'a model converted with mode="graph" has no class to store. Save its state_dict(), and load that into '
            'a model converted in the same way; or convert with mode="auto".'
        )
    content = {
        "format": FORMAT,
        "version": VERSION,
        "factory": factory,
        "module": None if factory else _pickled_skeleton(model),
        "recipes": {name: weight.told.to_dict() for name, weight in weights.items()},
        "manifest": manifest.to_json(),
        "state": model.state_dict(),
    }
    with written_atomically(path) as temporary:
        torch.save(content, temporary)


def read_nm_file(content: dict[str, Any], name: str, model: nn.Module | None, trust: Sequence[str]) -> nn.Module:
    """Make the converted model from the content of a ``.nm.pt`` file.

    Args:
        content: what ``load_trusted`` gave.
        name: what to call the file in messages.
        model: the dense model to convert, instead of the stored one.
        trust: packages to trust besides the usual.

    Raises:
        FileError: if the file is of another version, damaged, or does not fit the model.
    """
    if content.get("version") != VERSION:
        raise FileError(
            f"{name} has format version {content.get('version')!r}; this nmgraph reads version {VERSION}. Install the one that wrote it."
        )
    with _said_as_damage(name):
        recipes = {site: _recipe(values) for site, values in content["recipes"].items()}
        manifest = read_manifest(content["manifest"])
        state, factory, skeleton = content["state"], content["factory"], content["module"]
        ours = _our_buffers(recipes, state)
        shapes = {key: tuple(t.shape) for key, t in state.items() if isinstance(t, Tensor) and key not in ours}
        stored = None if skeleton is None else io.BytesIO(skeleton.numpy().tobytes())
    if model is None and stored is None and isinstance(factory, str) and NamedModel.names(factory):
        model = NamedModel.parse(factory).make()  # a library's own model; nobody else's code
    if model is None and stored is None:
        raise FileError(
            f"{name} was made with --model {factory}. Making the model runs that code, so name it again: {_again(factory)}"
        )
    bare = model is None
    if model is None:
        assert stored is not None
        model = load_trusted(stored, f"the module in {name}", trust)
        if not isinstance(model, nn.Module):
            raise FileError(f"{name} is damaged: it holds a {type(model).__name__} in place of a module.")
    if masked_weights(model):
        raise FileError(
            f"{name} can't be loaded into this {class_name(model)}, which is converted already. Give the dense model."
        )
    require_same_shapes(model, shapes, name)
    if bare:
        with _said_as_damage(name):
            _give_tensors(model, state)
    missing = [site for site in recipes if not isinstance(_find(model, site), nn.Parameter)]
    if missing:
        raise FileError(f"{name} is damaged: {', '.join(missing[:4])} holds no weight to make sparse.")
    with _said_as_damage(name):
        try:
            rewrite(model, recipes)
            load_weights(model, state, name)
            _require_orders(model)
        except BaseException:
            unmask_all(model)
            raise
    write_manifest(model, manifest)
    return model


@contextmanager
def _said_as_damage(name: str) -> Iterator[None]:
    """Say what goes wrong with a file's values as a damage of the file: it can claim anything of them."""
    try:
        yield
    except FileError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileError(f"{name} is damaged: {type(error).__name__}: {first_line(error)}.") from error


def _require_orders(model: nn.Module) -> None:
    """Look at the one kind of state that others are indexed by.

    Raises:
        ValueError: naming a site whose rows are not each in it once.
    """
    for site, weight in masked_weights(model).items():
        order = getattr(weight.state, "permutation", None)
        if order is not None and order.sort().values.tolist() != list(range(order.numel())):
            raise ValueError(f"the permutation of {site} is none")


def _find(model: nn.Module, site: str) -> Any:
    try:
        return getattr(*owner_of(model, site), None)
    except AttributeError:
        return None


def _recipe(values: dict[str, Any]) -> Recipe:
    if not is_axis(values["reduction_axis"]):
        raise ValueError(f"there is no reduction axis {values['reduction_axis']!r:.20}")
    return Recipe.from_dict(values)


def _again(factory: object) -> str:
    if str(factory).endswith(".pt2"):
        return f"--model {factory} --trust {TRUST}, or in Python model={str(factory)!r}, trust=[{TRUST!r}]."
    return f"--model {factory}, or in Python model={str(factory).replace(':', '.')}()."


def _our_buffers(recipes: Mapping[str, Recipe], state: Mapping[str, Any]) -> set[str]:
    """Name the entries of a state_dict that the conversion added."""
    ours = set()
    for site, recipe in recipes.items():
        path, _, key = parameter_of(site, state).rpartition(".")
        ours |= {f"{path}.{name}".lstrip(".") for name in buffer_names(key, recipe)}
    return ours


def _pickled_skeleton(model: nn.Module) -> Tensor:
    persistent = {id(t) for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in persistent:
            return duplicate(tensor).cpu()
        stand_in = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        return nn.Parameter(stand_in, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else stand_in

    skeleton = copy_structure(model, empty)
    unmask_all(skeleton)
    for module in skeleton.modules():  # how transformers read its files, in classes of its own
        module.__dict__.pop("_weight_conversions", None)
    buffer = io.BytesIO()
    try:
        torch.save(skeleton, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise FileError(
            f"{class_name(model)} can't be pickled: {error}. Put its classes and functions at the top of a module, "
            'or save with factory="package.module:function" naming a function that makes the dense model.'
        ) from error
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _give_tensors(skeleton: nn.Module, state: dict[str, Tensor]) -> None:
    """Replace one-element stand-ins by real memory, in place, so that tied parameters stay tied."""
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and isinstance(state.get(name), Tensor):
            tensor.data = torch.empty_like(state[name], dtype=tensor.dtype)
