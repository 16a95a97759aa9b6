"""The weights that the benchmarks measure on: a network's shapes, random values."""

import torch


def resnet50() -> list[torch.Tensor]:
    """Give Gaussian weights of ResNet-50's convolutions without the first: 23.4 million."""
    weights, inputs = [], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, inputs, 1, 1)] if block == 0 else []
            weights += [torch.randn(shape) for shape in shapes]
            inputs = 4 * width
    return weights
