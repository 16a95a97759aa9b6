"""Recognise what other programs wrote, by its content, and say what to do with it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

_START = 64  # bytes that are looked at

_ONNX = (
    "is an ONNX file, which holds a graph that can't be trained. Convert the PyTorch model it came from, saved with "
    "torch.save(model, ...). To check its weights: nmgraph verify."
)
_KERAS = (
    "is a TensorFlow or Keras file. nmgraph trains PyTorch models: port it, and save it with torch.save(model, ...)."
)
_NUMPY = (
    "holds numpy arrays without a model. Load them into the PyTorch model, and save that with torch.save(model, ...)."
)
_SAFETENSORS = (
    "holds weights without their model. Say what makes the model: --model timm:NAME, torchvision:NAME or "
    "package.module:function; of a Hugging Face model, give the directory that holds it and config.json."
)
_SHARDS = (
    "is a distributed checkpoint. Put it into one file, and name its model with --model:\n"
    "  from torch.distributed.checkpoint.format_utils import dcp_to_torch_save\n"
    "  dcp_to_torch_save({directory!r}, 'model.pt')"
)


def foreign_file(path: Path, start: bytes) -> str:
    """Say what a file is, if another program wrote it.

    Args:
        path: in doubt, what it is called counts: ONNX files begin like many others.
        start: its first bytes.

    Returns:
        What it is, and the remedy, to go behind its name; nothing if it is none of these.
    """
    for mark, text in (
        (b"GGUF", "is a GGUF file, whose weights are quantized. Convert the original: a Hugging Face directory, or a "
         "module saved with torch.save(model, ...)."),
        (b"\x89HDF\r\n\x1a\n", _KERAS),
        (b"\x93NUMPY", _NUMPY),
    ):  # fmt: skip
        if start.startswith(mark):
            return text
    if start[4:8] == b"TFL3":
        return _KERAS
    if is_safetensors(start):
        return _SAFETENSORS
    # Protobuf: the format version, then the producer's name or the graph.
    if path.suffix == ".onnx" or (start[:1] == b"\x08" and start[1:2] < b"\x20" and start[2:3] in b"\x12\x3a\x42"):
        return _ONNX
    return _KERAS if path.name == "saved_model.pb" else ""


def foreign_zip(members: Sequence[str]) -> str:
    """Say what a zip archive is, if another program wrote it, by the names of its members."""
    if members and all(name.endswith(".npy") for name in members):
        return _NUMPY
    if {"config.json", "metadata.json"} <= set(members) or any(name.endswith(".weights.h5") for name in members):
        return _KERAS
    return ""


def foreign_directory(path: Path) -> str:
    """Say what a directory is that is no Hugging Face model."""
    names = {entry.name for entry in path.iterdir()}
    if is_distributed(names):
        return _SHARDS.format(directory=str(path))
    if "saved_model.pb" in names:
        return _KERAS
    if {"report.json", "manifest.json"} <= names:
        return "is an export of nmgraph. Give a file in it, or the .nm.pt file it was made from."
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return "holds weights, but no config.json that names their model. Give a weight file, with --model."
    return "is a directory; give a model's file, or a Hugging Face directory with config.json."


def is_distributed(names: Collection[str]) -> bool:
    """Tell a directory of torch.distributed.checkpoint by the names in it."""
    return ".metadata" in names or any(name.endswith(".distcp") for name in names)


def is_safetensors(start: bytes) -> bool:
    """Tell a safetensors file by its start: the length of a JSON header, then the header."""
    return start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < 1 << 32
