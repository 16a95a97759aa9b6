"""Train on scikit-learn's digits under 2:4 with Hugging Face's Accelerate; stop and resume as it saves and loads.

    python examples/train_accelerate.py --out accelerate-output
    accelerate launch examples/train_accelerate.py --out accelerate-output

Three lines are nmgraph's: convert, attach, finalize. Everything they need to resume lies in the model, so that
``save_state`` and ``load_state`` do the rest. Nothing is downloaded. The exit code is 1 if a check does not hold.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nmgraph

EPOCHS = 6
BATCH = 32
ACCUMULATED = 2  # batches of a step
REQUIRED_ACCURACY = 0.9  # on the images it was trained on


def digits() -> TensorDataset:
    """1,797 handwritten digits, 64 gray values in 0..1 each."""
    found = load_digits()
    return TensorDataset(torch.from_numpy(found.data).float() / 16, torch.from_numpy(found.target))


def train(out: Path, epochs: int) -> nn.Module:
    """Train until ``epochs`` of EPOCHS are done, from the last state in ``out`` if there is one."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=ACCUMULATED)
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    nmgraph.convert(model, method="lbc", pattern="2:4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(digits(), batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = -(-len(loader) // ACCUMULATED)  # of an epoch, on this process; the last one may be short
    controller = nmgraph.attach(model, optimizer, total_steps=EPOCHS * steps)
    if (out / "state").exists():
        accelerator.load_state(out / "state")
    for _ in range(controller.step // steps, epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(out / "state")
    accelerator.print(f"{controller} of {EPOCHS} epochs")
    return accelerator.unwrap_model(model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("accelerate-output"))
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="stop after so many; run again to go on")
    arguments = parser.parse_args()
    model = train(arguments.out, arguments.epochs)
    if arguments.epochs < EPOCHS:
        return 0
    finished = nmgraph.finalize(model).cpu().eval()
    images, labels = digits().tensors
    accuracy = float((finished(images).argmax(1) == labels).float().mean())
    check = nmgraph.verify(finished)
    PartialState().print(f"{check}\naccuracy {accuracy:.1%}")
    return 0 if check.holds and accuracy >= REQUIRED_ACCURACY else 1


if __name__ == "__main__":
    sys.exit(main())
