"""ASP against its description: the mask of the dense checkpoint, and what trains under it."""

import copy

import pytest
import torch
from handles import nm
from torch import nn

import nmgraph
from nmgraph.errors import MethodError
from nmgraph.layers.masked import masked_weights


def largest(weight, n, m):
    """Keep the n largest magnitudes of every m, one block at a time."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            block = weight[row, start : start + m].abs().tolist()
            for place in sorted(range(m), key=lambda i: (-block[i], i))[:n]:
                mask[row, start + place] = True
    return mask


def steps(model, optimizer, count):
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(torch.randn(8, 16)) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
def test_trains_as_a_dense_layer_that_is_masked_before_and_after_each_step(n, m):
    dense = nn.Linear(16, 8).double()
    torch.set_default_dtype(torch.float64)
    try:
        ours = nmgraph.convert(copy.deepcopy(dense), method="asp", pattern=f"{n}:{m}")
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        nmgraph.attach(ours, optimizer, total_steps=10)
        steps(ours, optimizer, 10)

        mask = largest(dense.weight.detach(), n, m)
        with torch.no_grad():
            dense.weight.mul_(mask)
        dense.weight.register_hook(lambda grad: grad * mask)
        steps(dense, torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2), 10)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(nmgraph.finalize(ours).weight, dense.weight, rtol=1e-12, atol=1e-14)


def test_mask_is_chosen_once_more_where_asked():
    model = nmgraph.convert(nn.Linear(16, 8), method="asp", recompute_at=0.5)
    first = nm(model).mask()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    nmgraph.attach(model, optimizer, total_steps=10)
    with torch.no_grad():
        nm(model).raw.copy_(torch.randn(8, 16))
    steps(model, optimizer, 4)
    assert torch.equal(nm(model).mask(), first)
    steps(model, optimizer, 1)
    assert torch.equal(nm(model).mask(), largest(nm(model).raw.detach(), 2, 4))


def test_frozen_mask_needs_no_attach(recwarn):
    model = nmgraph.convert(nn.Linear(16, 8), method="asp")
    before = {name: nm(layer).mask() for name, layer in masked_weights(model).items()}
    steps(model, torch.optim.AdamW(model.parameters(), lr=0.1), 5)
    assert all(torch.equal(nm(layer).mask(), before[name]) for name, layer in masked_weights(model).items())
    assert not [w for w in recwarn if "attach" in str(w.message)]


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_moment_of_the_second_choice_lies_in_the_run(value):
    with pytest.raises(MethodError) as caught:
        nmgraph.convert(nn.Linear(16, 8), method="asp", recompute_at=value)
    assert str(caught.value) == f"asp: recompute_at={value} must lie in 0 to 1; it is a fraction of all steps."
