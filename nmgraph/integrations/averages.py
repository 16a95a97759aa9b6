"""Averages of a model's weights, by whoever makes them: torch, timm, or a loop over a copy's ``state_dict``."""

from __future__ import annotations

import torch
from torch import nn

from nmgraph.errors import ConversionError
from nmgraph.layers.masked import buffer_names, class_name, masked_weights
from nmgraph.passes.structure import unwrapped


@torch.no_grad()
def take_masks(average: nn.Module, model: nn.Module) -> None:
    """Give an average the masks, schedules and step counters of the model that it averages, in place.

    An average that copies buffers has them already. One that blends buffers, or leaves out what is no float, needs them
    before it is evaluated, saved, or finalized; its averaged weights are not touched.

    Args:
        average: a copy of ``model`` made after its conversion; wrappers such as AveragedModel are left away.
        model: the one in training.

    Raises:
        ConversionError: if the two are not converted alike.
    """
    own, theirs = masked_weights(unwrapped(average)), masked_weights(unwrapped(model))
    tolds = [{name: weight.told for name, weight in side.items()} for side in (own, theirs)]
    if not own or tolds[0] != tolds[1]:
        different = [name for name in {**tolds[1], **tolds[0]} if tolds[0].get(name) != tolds[1].get(name)]
        raise ConversionError(
            f"{different[0] if different else class_name(average)} is not sparse in the same way in the average and in "
            "the model. Make the average from the converted model."
        )
    for name, weight in own.items():
        for buffer in buffer_names(weight.key, weight.told):
            ours, new = weight.layer._buffers[buffer], theirs[name].layer._buffers[buffer]
            assert ours is not None
            assert new is not None
            ours.copy_(new)
