"""The kinds of layers whose ``weight`` is multiplied by their input, and which axis of it is summed over."""

from __future__ import annotations

from torch import nn

_BY_AXIS: dict[type[nn.Module], int] = {
    nn.Linear: 1,
    nn.Conv1d: 1,
    nn.Conv2d: 1,
    nn.Conv3d: 1,
    nn.ConvTranspose1d: 0,
    nn.ConvTranspose2d: 0,
    nn.ConvTranspose3d: 0,
}
_HF_CONV1D = "transformers.pytorch_utils", "Conv1D"  # a linear layer with its weight transposed


def layer_base(module: nn.Module) -> type[nn.Module] | None:
    """Give the class among a module's bases that makes it a layer of a known kind; None if there is none."""
    return next(filter(_is_base, type(module).__mro__), None)


def is_layer(module: object) -> bool:
    """Tell whether a module multiplies its input by its ``weight``."""
    return isinstance(module, nn.Module) and layer_base(module) is not None


def layer_axis(module: nn.Module) -> int:
    """Give the reduction axis of a layer's weight: 1, or 0 for transposed convolutions and Hugging Face's Conv1D."""
    base = layer_base(module)
    assert base is not None
    return _BY_AXIS.get(base, 0)


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Tell whether a class of layers computes otherwise than the class that makes it one."""
    base = next(b for b in kind.__mro__ if _is_base(b))
    return any(getattr(kind, f, None) is not getattr(base, f, None) for f in ("forward", "_conv_forward"))


def is_transposed_convolution(module: nn.Module) -> bool:
    """Tell whether a layer's groups divide axis 0 of its weight, its input channels."""
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


def _is_base(kind: type) -> bool:
    return kind in _BY_AXIS or (kind.__module__, kind.__name__) == _HF_CONV1D
