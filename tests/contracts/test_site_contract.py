"""What every method owes on every kind of site: trains, resumes bit for bit, and ends N:M on the site's own axis."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import nmgraph
from nmgraph.nm.grouping import canonical

STEPS = 12
AXES = {
    "conv": 1, "up": 0, "attention.in_proj_weight": 1, "attention.out_proj": 1, "cross.q_proj_weight": 1,
    "cross.k_proj_weight": 1, "cross.v_proj_weight": 1, "cross.out_proj": 1, "memory": 1, "turned": 0,
    "matrix": 0, "experts": -1, "cell.weight_ih": 1, "cell.weight_hh": 1,
}  # fmt: skip


class Everything(nn.Module):
    """One site of each kind."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 16, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True, kdim=8, vdim=8)
        self.memory, self.turned = nn.Linear(16, 8), Conv1D(16, 16)
        self.matrix, self.experts = nn.Parameter(0.1 * torch.randn(16, 16)), nn.Parameter(0.1 * torch.randn(2, 16, 16))
        self.cell = nn.GRUCell(16, 8)

    def forward(self, x):
        x = self.up(self.conv(x)).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        memory = self.memory(x)
        x = x + self.cross(x, memory, memory, need_weights=False)[0]
        x = self.turned(x.contiguous()) @ self.matrix
        x = F.linear(x, self.experts[0]) + F.linear(x, self.experts[1])
        return self.cell(x.mean(1), memory.mean(1))


def start(method):
    torch.manual_seed(0)
    model = nmgraph.convert(Everything(), method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    return model, optimizer


def run(model, optimizer, steps):
    x = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    for _ in steps:
        optimizer.zero_grad()
        (model(x) - 0.3).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", nmgraph.METHODS)
def test_every_kind_of_site_trains_resumes_and_ends_sparse_on_its_axis(method):
    model, optimizer = start(method)
    found = nmgraph.manifest(model)
    assert {e.name: e.axis for e in found.converted} == AXES
    assert not found.skipped
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}
    run(model, optimizer, range(5))
    half, half_optimizer = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(5, STEPS))
    unchanged = {name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])}
    assert unchanged <= {"cross.q_proj_weight", "cross.k_proj_weight"}  # whose gradients are below a bit of the weights

    resumed, its_optimizer = start(method)
    resumed.load_state_dict(half)
    its_optimizer.load_state_dict(half_optimizer)
    run(resumed, its_optimizer, range(5, STEPS))
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), model.state_dict().values(), strict=True)
    )

    finished = nmgraph.finalize(model)
    parameters = dict(finished.named_parameters())
    for name, axis in AXES.items():
        weight = parameters.get(name, parameters.get(f"{name}.weight"))
        blocks = canonical(weight.detach(), axis)
        assert (blocks.reshape(*blocks.shape[:-1], -1, 4).ne(0).sum(-1) <= 2).all(), name
    assert type(finished) is Everything
    x = torch.randn(2, 4, 3, 3)
    for mode in (True, False, True):
        assert torch.allclose(finished.train(mode)(x), model.train(mode)(x), atol=1e-6)
