"""Models that ``torch.export.save`` wrote: ``.pt2`` files.

``torch.export.load`` runs code that a file names: weights and constants marked as pickled, and example inputs that are
not plain, are unpickled without limits, and symbolic sizes are evaluated as Python. So it is called only with trust.

A program was exported in one mode, and keeps it. One whose batch norm, dropout or random numbers were fixed by that mode
would train wrong without a word, and is refused; one without such operators is the same in both.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from nmgraph.errors import FileError, UntrustedError, first_line

TRUST = "torch.export"
_SAVE = "Save the Python model instead: torch.save(model, ...)."
_DROPOUT = ("dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
_NORM = ("batch_norm", "native_batch_norm", "cudnn_batch_norm", "instance_norm", "_native_batch_norm_legit",
         "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training", "_batch_norm_with_update")  # fmt: skip
_RANDOM = ("bernoulli", "bernoulli_", "rand", "rand_like", "randn", "randn_like", "rrelu", "rrelu_with_noise")


def is_exported(members: Sequence[str]) -> bool:
    """Tell an exported program by the names in its zip archive, without their first folder."""
    return ("archive_format" in members and any(m.startswith("models/") for m in members)) or (
        "serialized_exported_program.json" in members
    )


def open_exported(path: Path, trust: Sequence[str] = ()) -> nn.Module:
    """Read an exported program as a module that can be trained.

    Raises:
        UntrustedError: without ``torch.export`` among what is trusted; nothing was loaded then.
        FileError: if it can't be read, or does not train as the model it was exported from.
    """
    if TRUST not in trust:
        raise UntrustedError(
            f"{path} is an exported program (torch.export.save). Reading one can run code that it holds, so nothing was "
            f"loaded or run. If you made it, allow that with --trust {TRUST} (in Python: trust=[{TRUST!r}])."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
            module = program.module()
    except Exception as error:
        # Reading rebuilds tensors, graphs and symbolic sizes; damage can make any of it raise anything.
        raise FileError(
            f"{path} can't be read: {first_line(error)}. Export it again with this version of torch."
        ) from error
    assert isinstance(module, fx.GraphModule)
    _require_both_modes(module, path)
    if not any(p.requires_grad for p in module.parameters()):
        raise FileError(f"{path} holds no parameter that can be trained. {_SAVE}")
    # A program refuses train() and eval(), lest one think they change it. Here they would change nothing.
    for name in ("train", "eval"):
        setattr(module, name, types.MethodType(getattr(nn.Module, name), module))
    return module


def _require_both_modes(module: fx.GraphModule, path: Path) -> None:
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            found = _fixed_by_mode(node)
            if found:
                raise FileError(
                    f"{path} can't be trained as the model it was exported from: {found} ({node.name}). {_SAVE}"
                )


def _fixed_by_mode(node: fx.Node) -> str:
    """Say how an operator was fixed by the mode of the export, if it was."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    operator = node.target._schema.name.rpartition("::")[2]
    if operator in _RANDOM:
        return "it draws random numbers in training and evaluation alike"
    if operator in _NORM:
        training = _argument(node, "training", _argument(node, "use_input_stats", False))
        return f"batch norm is fixed to {'its batches' if training else 'running statistics, which would never move'}"
    if operator in _DROPOUT and _argument(node, "p", 0.0):
        training = _argument(node, "train", _argument(node, "training", False))
        return f"dropout is {'drawn in evaluation, too' if training else 'switched off for good'}"
    if (
        operator.startswith("scaled_dot_product")
        and operator.endswith("attention")
        and _argument(node, "dropout_p", 0.0)
    ):
        return "attention's dropout is drawn in evaluation, too"
    return ""


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """Give what an operator is called with."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            given = node.args[place] if place < len(node.args) else argument.default_value
            return node.kwargs.get(name, given)
    return default
