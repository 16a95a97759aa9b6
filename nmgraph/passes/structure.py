"""Copy a model's modules, and choose what becomes of its tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nmgraph.errors import ConversionError
from nmgraph.layers.sharding import is_sharded


def share(tensor: Tensor) -> Tensor:
    """Keep the tensor itself."""
    return tensor


def share_parameters(tensor: Tensor) -> Tensor:
    """Keep a parameter itself, but copy any other tensor: a forward may change buffers."""
    return tensor if isinstance(tensor, nn.Parameter) else duplicate(tensor)


def duplicate(tensor: Tensor) -> Tensor:
    """Copy the tensor; one that is part of a graph of autograd is cut from it, as no copy of it can be a part."""
    return copy.deepcopy(tensor) if tensor.is_leaf else tensor.detach().clone()


def copy_structure(model: nn.Module, become: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy all modules and what they hold, except for tensors: each becomes, once, what ``become`` makes of it.

    Raises:
        ConversionError: if something that a module holds cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = become(tensor)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} can't be copied: {error}. Remove what it holds besides layers and values, such as "
            "open files or locks."
        ) from error


def owner_of(model: nn.Module, site: str) -> tuple[nn.Module, str]:
    """Find the module that holds a site's parameter, and the parameter's name in it.

    Raises:
        AttributeError: if there is no such site.
    """
    module, names = model, site.split(".") if site else []
    while names and (child := module._modules.get(names[0])) is not None:
        module, names = child, names[1:]
    if len(names) > 1:
        raise AttributeError(f"there is no module {site.rpartition('.')[0]}")
    return module, names[0] if names else "weight"


def parameter_of(site: str, names: Container[str]) -> str:
    """Name the parameter of a site: its own name if that is among ``names``, else its ``weight``."""
    return site if site in names else f"{site}.weight".lstrip(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the model inside ``torch.compile``'s wrapper, data parallelism or an average; any other as it is."""
    while True:
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif isinstance(model, (nn.DataParallel, DistributedDataParallel, AveragedModel)):
            inner = model.module
        elif _is_called(model, "ModelEmaV2", "ModelEmaV3"):
            inner = model._modules["module"]
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def blends_buffers(model: nn.Module) -> bool:
    """Tell whether a wrapper is an average that takes its model's buffers for numbers to average, whole ones as well."""
    return model.use_buffers if isinstance(model, AveragedModel) else _is_called(model, "ModelEmaV2")


def _is_called(model: nn.Module, *names: str) -> bool:
    """Tell a class by its name: its package need not be there."""
    return any(base.__name__ in names for base in type(model).__mro__)


def find_sharded(model: nn.Module) -> str:
    """Say what of a model is sharded over processes (FSDP, tensor parallelism), if anything is; found by its names."""
    for name, module in model.named_modules():
        if _is_called(module, "FullyShardedDataParallel"):
            return f"{name or 'the model'} is wrapped in FullyShardedDataParallel"
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            return f"{name} is a DTensor, sharded over processes"
    return ""


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Find every tensor a module holds, also activations that a forward has put on it."""
    pending: list[Any] = [module.__dict__ for module in model.modules()]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))  # a container may hold itself
            pending.extend(value.values() if isinstance(value, dict) else value)
