"""Models with logs and exports to report on."""

import math

import torch
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.layers.masked import masked_weights
from nmgraph.training.run_log import Picture, Record, Run, to_line
from nmgraph.training.telemetry import take_picture


def trained(folder, *, steps=12, until=None):
    """Train a small network with LBC, and give it with the path of its log."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8)
    )  # fmt: skip
    nmgraph.convert(model, method="lbc", example_inputs=torch.randn(1, 3, 12, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = folder / "run.jsonl"
    telemetry = nmgraph.record(nmgraph.attach(model, optimizer, total_steps=steps), log, every=1)
    for _ in range(steps if until is None else until):
        loss = F.cross_entropy(model(torch.randn(8, 3, 12, 12)), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        telemetry.note(loss=loss)
    telemetry.close()
    return model, log


class WithAttention(nn.Module):
    """Own a bare parameter, and layers of long names and kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(32, 16))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 6)  # no pattern divides it

    def forward(self, x):
        return self.head(self.encoder(F.linear(x, self.embed)).mean(1))


def with_attention(folder, pattern="1:16"):
    """Train it halfway with two metrics, one of which is noted at the end alone."""
    torch.manual_seed(0)
    model = nmgraph.convert(
        WithAttention(), method="lbc", pattern=pattern, skip=["head"], example_inputs=torch.randn(1, 4, 16)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    telemetry = nmgraph.record(nmgraph.attach(model, optimizer, total_steps=80), folder / "run.jsonl", every=2)
    for step in range(20):
        loss = F.cross_entropy(model(torch.randn(8, 4, 16)), torch.arange(8) % 6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        telemetry.note(loss=loss, **({"held_out_accuracy": 0.5} if step > 14 else {}))
    telemetry.close()
    return model, folder / "run.jsonl"


def resnet50(folder):
    """Convert a ResNet-50, and make up a log of the length that a long run has."""
    from torchvision.models import resnet50

    model = nmgraph.convert(resnet50(weights=None), method="srste")
    weights = masked_weights(model)
    layers = {
        name: {
            "method": "srste",
            "options": {},
            "pattern": "2:4",
            "shape": list(weight.raw.shape),
            "axis": 1,
            "splits_backward": False,
        }
        for name, weight in weights.items()
    }
    noise = torch.rand(200, len(layers)).tolist()
    records = [
        Record(
            5 * i, float(i), {"loss": 7 * math.exp(-i / 50)},
            {name: {"kept": 0.5, "flipped": 0.05 * math.exp(-i / 40) * x, "magnitude": 0.7 + 0.1 * x}
             for name, x in zip(layers, noise[i], strict=True)},
        )
        for i in range(200)
    ]  # fmt: skip
    with torch.no_grad():
        shown = {name: take_picture(weight, weight.mask()) for name, weight in weights.items()}
    turned = {name: type(p)(p.mask.roll(1, 0), p.magnitudes, p.kept) for name, p in shown.items()}
    pictures = [Picture(125 * i, turned if i % 2 else shown) for i in range(9)]
    log = folder / "run.jsonl"
    entries = (Run(0, 1000, 5, layers, {"nmgraph": "0.1.0", "torch": "2.13.0"}), *records, *pictures)
    log.write_text("\n".join(map(to_line, entries)) + "\n")
    return model, log
