"""A DataParallel replica gets plain tensors in place of parameters, and has to mask them too."""

import torch
from handles import nm
from torch import nn

import nmgraph


def test_a_replica_masks_the_weights_it_is_given():
    layer = nmgraph.convert(nn.Linear(16, 8), method="srste")
    replica = layer._replicate_for_data_parallel()
    replica.weight = nm(layer).raw.detach().clone()  # as torch.nn.parallel.replicate does
    replica.bias = layer.bias
    x = torch.randn(4, 16)
    assert torch.equal(replica(x), layer(x))
    assert "weight" in dict(layer.named_parameters())
