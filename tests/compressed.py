"""Export small models compressed, compare them bit by bit, and write a file again with something changed."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nmgraph

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def export(model, directory, precision="fp32", **options):
    options = {"method": "srste"} | options
    converted = nmgraph.convert(model, **options)
    report = nmgraph.export(converted, directory, onnx=False, safetensors=True, precision=precision)
    return converted, report, directory / "model.safetensors"


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.view(INTEGERS[one.itemsize]), other.view(INTEGERS[other.itemsize])
    )


def same_state(model, other):
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(same_bits(one[key], two[key]) for key in one)


def metadata_of(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def rewrite(path, change):
    """Write the file again, as ``change`` makes its tensors, header and manifest."""
    tensors, metadata = load_file(path), metadata_of(path)
    header, manifest = (json.loads(metadata[key]) for key in ("nmgraph.compressed", "nmgraph.manifest"))
    change(tensors, header, manifest)
    metadata |= {"nmgraph.compressed": json.dumps(header), "nmgraph.manifest": json.dumps(manifest)}
    save_file(tensors, path, metadata)


TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
