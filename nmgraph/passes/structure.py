"""Copy a model's modules, and choose what becomes of its tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nmgraph.errors import ConversionError


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


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the model inside ``torch.compile``'s wrapper, data parallelism or an average; any other as it is."""
    while True:
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif isinstance(model, (nn.DataParallel, DistributedDataParallel, AveragedModel)):
            inner = model.module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


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
