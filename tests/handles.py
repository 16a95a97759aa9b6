"""Short for tests: the handle to a layer's masked weight."""

from nmgraph.layers.masked import MaskedWeight


def nm(layer, key="weight"):
    return layer if isinstance(layer, MaskedWeight) else MaskedWeight(layer, key)
