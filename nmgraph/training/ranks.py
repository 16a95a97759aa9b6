"""Hold the processes of a distributed run to the same masks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from nmgraph.errors import TrainingError
from nmgraph.layers.masked import MaskedWeight


def require_equal_ranks(weights: Mapping[str, MaskedWeight], group: Any = None) -> None:
    """Compare masks and clocks of all processes, each of which has to call this.

    Raises:
        TrainingError: naming the first layer that differs, and where.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    own = {name: digest(weight) for name, weight in weights.items()}
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, own, group=group)
    for name in own:
        differ = [rank for rank, digests in enumerate(found) if digests.get(name) != found[0].get(name)]
        if differ:
            raise TrainingError(
                f"{name}: its mask on the processes {differ} is not that of process 0. Start them with the same seed and "
                "the same weights, and step all of them alike; then load a checkpoint on all, or start anew."
            )


@torch.no_grad()
def digest(weight: MaskedWeight) -> int:
    """Make one number of a weight's mask and clock."""
    mask = weight.mask().contiguous().view(torch.uint8).cpu().numpy()
    return zlib.crc32(mask.tobytes(), zlib.crc32(weight.clock.cpu().numpy().tobytes()))
