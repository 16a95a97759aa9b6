"""The order in which YOLO trainers do things: an average by hand, saved as a half-precision module, resumed from."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from variants import VARIANTS

import nmgraph
from nmgraph.errors import UnfinishedError
from nmgraph.integrations.averages import take_masks
from nmgraph.layers.masked import masked_weights

STEPS, HALF = 16, 7


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Linear(32, 8)
        self.names, self.stride = ["eight", "kinds"], torch.tensor([8.0])

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))).flatten(1))


class Average:
    """Averages what is a float, and leaves alone what is none."""

    def __init__(self, model, updates=0):
        self.ema, self.updates = copy.deepcopy(model).eval(), updates
        for p in self.ema.parameters():
            p.requires_grad_(False)

    def update(self, model):
        self.updates += 1
        d = 0.9 * (1 - math.exp(-self.updates / 4))
        theirs = model.state_dict()
        for key, value in self.ema.state_dict().items():
            if value.dtype.is_floating_point:
                value *= d
                value += (1 - d) * theirs[key].detach()

    def update_attributes(self, model):
        for key, value in model.__dict__.items():
            if not key.startswith("_"):
                setattr(self.ema, key, value)


class Trainer:
    def __init__(self, variant, checkpoint=None, follow=True):
        torch.manual_seed(1)
        method, options = VARIANTS[variant]
        self.model = nmgraph.convert(Detector(), method=method, **options)
        self.optimizer = torch.optim.SGD(self._groups(), lr=0.05, momentum=0.9, nesterov=True)
        self.average, self.follow = Average(self.model), follow
        if checkpoint is not None:
            saved = torch.load(checkpoint, weights_only=False)
            state = saved["ema"].float().state_dict()
            self.model.load_state_dict(state, strict=False)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average = Average(self.model, saved["updates"])
            self.average.ema.load_state_dict(state)
        self.controller = nmgraph.attach(self.model, self.optimizer, total_steps=STEPS)

    def _groups(self):
        whole = [p for p in self.model.parameters() if p.dim() > 1]
        return [
            {"params": whole, "weight_decay": 5e-4},
            {"params": [p for p in self.model.parameters() if p.dim() < 2]},
        ]

    def train(self, steps, checkpoint):
        scaler = torch.amp.GradScaler("cpu")
        for _ in range(steps):
            x = torch.randn(8, 8, 4, 4)
            scaler.scale(F.cross_entropy(self.model(x), x.flatten(1).argmax(1) % 8)).backward()
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
            scaler.step(self.optimizer)
            scaler.update()
            self.optimizer.zero_grad()
            self.average.update(self.model)
        self.average.update_attributes(self.model)
        if self.follow:
            take_masks(self.average.ema, self.model)
        saved = {
            "model": None,
            "ema": copy.deepcopy(self.average.ema).half(),
            "updates": self.average.updates,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }
        torch.save(saved, checkpoint)


def stripped(checkpoint):
    """Leave of a checkpoint what is deployed."""
    saved = torch.load(checkpoint, weights_only=False)
    torch.save({"model": saved["ema"].half(), "ema": None, "optimizer": None}, checkpoint)
    return torch.load(checkpoint, weights_only=False)["model"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_average_keeps_the_masks_and_the_place_in_the_schedule(variant, tmp_path):
    first = Trainer(variant)
    first.train(HALF, tmp_path / "last.pt")
    second = Trainer(variant, tmp_path / "last.pt")
    assert second.controller.step == HALF
    second.train(STEPS - HALF, tmp_path / "last.pt")
    best = stripped(tmp_path / "last.pt")
    assert best.head.bias.dtype == torch.float16
    assert {name: weight.told for name, weight in masked_weights(best).items()} == {
        name: weight.told for name, weight in masked_weights(second.model).items()
    }
    finished = nmgraph.finalize(best.float())
    assert type(finished) is Detector
    assert nmgraph.verify(finished).holds
    for name, weight in masked_weights(second.model).items():
        state, own = weight.state._asdict(), masked_weights(best)[name].state._asdict()
        assert all(torch.equal(own[key], t) for key, t in state.items())


def test_an_average_whose_masks_were_left_behind_says_how_to_take_them(tmp_path):
    trainer = Trainer("lbc", follow=False)
    trainer.train(STEPS, tmp_path / "last.pt")
    with pytest.raises(UnfinishedError) as caught:
        nmgraph.finalize(stripped(tmp_path / "last.pt").float())
    assert str(caught.value) == (
        "2 layers are not N:M yet (lbc 2:4; it was never trained with attach):\n"
        "  stem: 144 of 144 blocks still keep more than 2 of 4\n"
        "  head: 64 of 64 blocks still keep more than 2 of 4\n"
        "Train to the end, or use --force (force=True) to prune now by what the method knows. The average of a trained "
        "model takes that model's masks first: nmgraph.integrations.averages.take_masks(average, model)."
    )


def test_attaching_again_takes_the_layers_over_from_the_old_optimizer():
    trainer = Trainer("srste")
    before = trainer.controller
    optimizer = torch.optim.AdamW(trainer.model.parameters())
    controller = nmgraph.attach(trainer.model, optimizer, total_steps=STEPS)
    trainer.model(torch.randn(2, 8, 4, 4)).sum().backward()
    trainer.optimizer.step()
    assert (controller.step, len(before._weights)) == (0, 0)
    optimizer.step()
    assert controller.step == 1
