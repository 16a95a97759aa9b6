"""Write the files of format version 1 that tests read ever after; not run again, as later code must read these.

python tests/checkpoint/data/write.py
"""

from pathlib import Path

import torch
from torch import nn

import nmgraph

STEPS, TOTAL = 3, 8


def write(method: str) -> None:
    """Write a small network in the middle of its training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    nmgraph.convert(model, method=method, layers={"4": "1:4"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nmgraph.attach(model, optimizer, total_steps=TOTAL)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(4, 4, 6, 6)).square().mean().backward()
        optimizer.step()
    nmgraph.save(model, Path(__file__).parent / f"version-1-{method}.nm.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for method in ("lbc", "bimask"):
        write(method)
