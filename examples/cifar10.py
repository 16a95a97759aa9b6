"""CIFAR-10 as tensors: read from an archive of JPEGs or from the data set's own files, and augmented in batches.

`load` takes either of

- an `.npz` with, for `train` and `test`, `{split}_jpeg` (uint8, all files end to end), `{split}_offsets` (int64,
  file i is `jpeg[offsets[i]:offsets[i + 1]]`) and `{split}_labels`. JPEG loses a little: say so beside an accuracy;
- a directory as torchvision makes it, with `cifar-10-batches-py/data_batch_1` to `_5` and `test_batch` in it.
"""

import codecs
import io
import itertools
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images' red, green and blue
BATCH_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def load(path: Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Give images, uint8 `[n, 3, 32, 32]`, and labels, int64 `[n]`; the first `limit` of them."""
    if path.is_file() and path.suffix == ".npz":
        return _read_jpegs(path, split, limit)
    for directory in (path / "cifar-10-batches-py", path):
        if all((directory / name).is_file() for name in BATCH_FILES[split]):
            return _read_batches(directory, split, limit)
    raise SystemExit(
        f"No CIFAR-10 at {path}. Looked for an .npz file of JPEGs, and for {', '.join(BATCH_FILES[split])} in "
        f"{path / 'cifar-10-batches-py'} and in {path}."
    )


def augment(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop every image at its own place after padding by 4 pixels, and mirror some.

    `shifts` is int64 `[n, 2]` in 0..8, down and to the right; `flips` is bool `[n]`. A whole batch is one gather.
    """
    along = torch.arange(32, device=images.device)
    rows = shifts[:, :1] + along
    columns = shifts[:, 1:] + torch.where(flips[:, None], 31 - along, along)
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalize(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] * 255 for v in (MEAN, STD))
    return ((images - mean) / std).contiguous()


def _read_jpegs(path: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        data, offsets, labels = (archive[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels"))
    spans = list(itertools.pairwise(offsets))[:limit]
    images = np.stack([np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in spans])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[:limit]).long()


def _read_batches(directory: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    batches = []
    for name in BATCH_FILES[split]:
        with (directory / name).open("rb") as file:
            batches.append(_ArraysOnly(file, encoding="latin1").load())
    images = np.concatenate([batch["data"] for batch in batches])[:limit].reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch["labels"] for batch in batches])[:limit]
    return torch.from_numpy(images), torch.from_numpy(labels).long()


class _ArraysOnly(pickle.Unpickler):
    """The data set's files are pickles, and a pickle can run code. They need NumPy's arrays and get nothing else."""

    ALLOWED: ClassVar = {
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy._core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "_codecs.encode": codecs.encode,
    }

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 file; nothing was run.")
        return self.ALLOWED[f"{module}.{name}"]
