"""The closed forms in which the papers count training, and the figures that they print.

All are shares of dense training, with the forward, the input gradient and the weight gradient of every layer a third
each. SR-STE, T-Mask and Bi-Mask count a product as sparse where hardware could use it: SR-STE the forward, the other two
the input gradient as well. LBC and BAME count all three at the density that the masks have. Where one figure follows
from another convention than its neighbours, our form is off by as much as the table in the documentation says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nmgraph.accounting.cost import plan_cost
from nmgraph.accounting.macs import Macs, ModelMacs
from nmgraph.methods import make_method
from nmgraph.nm.pattern import Pattern

_ONE_LAYER = ModelMacs({"": Macs(1, 1, 1)}, Macs(0, 0, 0))
_ASP_EPOCHS = (100, 100, 120)
"""ImageNet: dense, then sparse, over what the others train."""


def _at_density_of_masks(name: str, pattern: Pattern) -> float:
    return plan_cost(_ONE_LAYER, {"": (make_method(name, {}), pattern)}).ratio


def _asp(pattern: Pattern) -> float:
    dense, sparse, usual = _ASP_EPOCHS
    return (dense + sparse * pattern.density) / usual


FORMS: Mapping[str, tuple[str, Callable[[Pattern], float]]] = {
    "srste": ("(d + 2) / 3", lambda pattern: (pattern.density + 2) / 3),
    "tmask": ("(2 d + 1) / 3", lambda pattern: (2 * pattern.density + 1) / 3),
    "bimask": ("(2 d + 1) / 3", lambda pattern: (2 * pattern.density + 1) / 3),
    "lbc": ("mean density of the masks", lambda pattern: _at_density_of_masks("lbc", pattern)),
    "bame": ("mean density of the masks", lambda pattern: _at_density_of_masks("bame", pattern)),
    "asp": ("(100 + 100 d) / 120 epochs", _asp),
}
"""By method: the form in words, d being N / M, and as a function."""

PRINTED: Mapping[tuple[str, str], float] = {
    ("srste", "2:4"): 0.83, ("srste", "1:4"): 0.74, ("srste", "1:16"): 0.69,
    ("bimask", "2:4"): 0.66, ("bimask", "1:4"): 0.49, ("bimask", "1:16"): 0.37,
    ("lbc", "2:4"): 0.72, ("lbc", "2:8"): 0.53, ("lbc", "1:4"): 0.51, ("lbc", "1:16"): 0.38,
    ("bame", "2:4"): 0.63, ("bame", "1:4"): 0.39, ("bame", "1:16"): 0.29,
    ("asp", "2:4"): 1.24,
}  # fmt: skip
"""What the papers print for training on ImageNet, by method and pattern."""


def published_ratio(method: str, pattern: Pattern) -> float | None:
    """Give the training cost over the dense one in the papers' closed form; None if they have none for the method."""
    form = FORMS.get(method)
    return None if form is None else form[1](pattern)
