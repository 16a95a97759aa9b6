"""Models that are made by what the user names: ``pkg.mod:factory``, or a library's own name, ``timm:resnet50``."""

from __future__ import annotations

import importlib
import re

from torch import Tensor, nn

from nmgraph.checkpoint.named_models import NamedModel
from nmgraph.errors import FileError, MissingPackageError
from nmgraph.layers.masked import PREFIX, class_name, masked_weights

# Of apex's ASP, of ModelOpt, of torch.ao.pruning and torch.nn.utils.prune.
_FOREIGN_MASKS = (".__weight_mma_mask", "._weight_mask", ".parametrizations.weight.original", ".weight_mask")


def call_factory(factory: str) -> nn.Module:
    """Import ``pkg.mod:factory`` and call it without arguments; or make the model that timm or torchvision has by a name.

    Raises:
        FileError: if the text has another form, there is no such function, or it gives no module.
        MissingPackageError: if its module cannot be imported.
    """
    if NamedModel.names(factory):
        return NamedModel.parse(factory).make()
    match = re.fullmatch(r"([\w.]+):([\w.]+)", factory)
    if match is None:
        raise FileError(f"{factory!r} does not name a function. Write --model package.module:function.")
    try:
        found = importlib.import_module(match[1])
    except Exception as error:
        raise MissingPackageError(f"{factory}: {match[1]} could not be imported: {error}.") from error
    for attribute in match[2].split("."):
        if not hasattr(found, attribute):
            raise FileError(f"{factory}: {match[1]} has no {match[2]}.")
        found = getattr(found, attribute)
    if not callable(found):
        raise FileError(f"{factory} is a {type(found).__name__}, not a function that makes the model.")
    try:
        model = found()
    except Exception as error:
        raise FileError(f"{factory} failed when called without arguments: {type(error).__name__}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise FileError(f"{factory} gave a {type(model).__name__}; it must give a torch.nn.Module.")
    return model


def load_weights(model: nn.Module, state: dict[str, object], file: str) -> None:
    """Load a state_dict strictly.

    Raises:
        FileError: listing what is missing, unexpected or of another shape.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FileError(f"{file} does not fit {class_name(model)}: {error}{_hint(model, state)}") from error


def _hint(model: nn.Module, state: dict[str, object]) -> str:
    foreign = next((key for key in state if str(key).endswith(_FOREIGN_MASKS)), None)
    if foreign is not None:
        return (
            f"\nThe file holds masks of another program ({foreign}). Let that program fold them into the weights and save "
            "those, or multiply each weight by its mask and leave the masks out; then load it."
        )
    ours = any(str(key).rpartition(".")[2].startswith(PREFIX) for key in state)
    if not ours or masked_weights(model):
        return ""
    return (
        "\nThe file holds the state_dict of a converted model: convert the dense model in the same way, and call "
        "load_state_dict. A file of nmgraph.save says by itself what it is."
    )


def require_same_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]], name: str) -> None:
    """Refuse to load tensors of other names or shapes than a model's, before any of it is changed.

    Args:
        model: to load into.
        shapes: of the tensors in the file.
        name: of the file, in messages.

    Raises:
        FileError: listing what is missing, unexpected or of another shape.
    """
    own = {key: tuple(t.shape) for key, t in model.state_dict().items() if isinstance(t, Tensor)}
    found = [f"{key} is missing in the file" for key in own if key not in shapes]
    found += [f"{key} is not in the model" for key in shapes if key not in own]
    found += [
        f"{key} is {'x'.join(map(str, shapes[key]))} in the file, {'x'.join(map(str, size))} in the model"
        for key, size in own.items()
        if key in shapes and shapes[key] != size
    ]
    if found:
        more = f"\n  and {len(found) - 8} more" if len(found) > 8 else ""
        raise FileError(
            f"{name} was made from another model than this {class_name(model)}:\n  " + "\n  ".join(found[:8]) + more
        )
