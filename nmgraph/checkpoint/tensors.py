"""Read ``.safetensors`` files: with all their zeros, or compressed as an export writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nmgraph.checkpoint.factory import load_weights, require_same_shapes
from nmgraph.errors import FileError, PatternError
from nmgraph.layers.masked import class_name, masked_weights
from nmgraph.nm.grouping import is_axis
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.compression import SCHEMA_KEY, CompressedWeight, Schema
from nmgraph.passes.manifest import MANIFEST_KEY, Manifest, write_manifest
from nmgraph.passes.structure import parameter_of
from nmgraph.passes.verification import Verification, WeightCheck, verify_tensors


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        tensors: dense, by their names in the ``state_dict``; one that stands under several names, under each.
        manifest: of the conversion, if an export wrote the file.
        schema: of the compressed weights, if there are any.
        damaged: what is wrong with compressed weights that could not be read, which are not in ``tensors``.
    """

    tensors: dict[str, Tensor]
    manifest: Manifest | None
    schema: Schema | None
    damaged: dict[str, str]


def load_safetensors(path: Path) -> Weights:
    """Read all tensors of a file, and what an export wrote beside them.

    What a header claims of sizes is held to the tensors in the file before anything is made of it.

    Raises:
        FileError: if it is missing, damaged, or contradicts itself.
    """
    if not path.exists():
        raise FileError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            manifest = read_manifest(metadata[MANIFEST_KEY]) if metadata.get(MANIFEST_KEY) else None
            schema = Schema.from_json(metadata[SCHEMA_KEY]) if SCHEMA_KEY in metadata else None
            if schema is not None:
                _require_consistent(opened, schema, manifest)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FileError(
            f"{path} can't be read as safetensors: {str(error).rstrip('.')}. Copy it again, or export again."
        ) from error
    if schema is None:
        return Weights(tensors, manifest, None, {})
    dense, damaged = _decompressed(tensors, schema)
    return Weights(dense, manifest, schema, damaged)


def verify_safetensors(path: Path, pattern: Pattern | None = None) -> Verification:
    """Check the weights of a file, and how they are stored.

    Args:
        path: the file.
        pattern: to check against; default each site's own, or 2:4.

    Raises:
        FileError: if it cannot be read, or contradicts itself.
    """
    found = load_safetensors(path)
    weights = found.schema.weights if found.schema else {}
    unreadable = [_failed(name, weights[name], finding) for name, finding in found.damaged.items()]
    return verify_tensors(path.name, found.tensors, pattern, found.manifest, unreadable)


def load_compressed(path: Path, model: nn.Module | None) -> nn.Module:
    """Load the weights of a compressed file into the dense model, in place and in the model's own dtype.

    Returns:
        The model: an ordinary one with exact zeros, and the manifest of the conversion.

    Raises:
        FileError: if the file is not compressed, is damaged, or does not fit; the model is as it was then.
    """
    found = load_safetensors(path)
    if found.manifest is None or found.schema is None:
        raise FileError(
            f"{path} holds no compressed weights. Load it with safetensors.torch.load_model(model, {str(path)!r})."
        )
    if model is None:
        raise FileError(
            f"{path} holds weights without their model. Give the dense model, whose tensors are replaced: "
            "nmgraph.load(path, model=model), or --model package.module:function."
        )
    if masked_weights(model):
        raise FileError(
            f"{path} can't be loaded into this {class_name(model)}, which is converted already. Give the dense model."
        )
    if found.damaged:
        name, what = next(iter(found.damaged.items()))
        raise FileError(f"{path} is damaged: {name}: {what}. Copy it again, or export again.")
    require_same_shapes(model, {name: tuple(t.shape) for name, t in found.tensors.items()}, str(path))
    load_weights(model, dict(found.tensors), str(path))
    write_manifest(model, found.manifest)
    return model


def read_manifest(text: str) -> Manifest:
    """Read a manifest, and look at what is used of it: a file can claim anything.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        manifest = Manifest.from_json(text)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {MANIFEST_KEY} is damaged ({type(error).__name__}: {error})") from error
    for entry in manifest.converted:
        if not isinstance(entry.name, str) or not is_axis(entry.axis):
            raise ValueError(f"its manifest gives {entry.name!s} the reduction axis {entry.axis!s:.20}")
        Pattern.parse(entry.pattern)
    return manifest


def _require_consistent(opened: Any, schema: Schema, manifest: Manifest | None) -> None:
    """Hold a schema to the tensors that are there, and to the manifest.

    Raises:
        ValueError: saying what contradicts what.
    """
    if manifest is None:
        raise ValueError(f"it is compressed, but its metadata have no {MANIFEST_KEY}")
    names = set(opened.keys())
    parts = [part for weight in schema.weights.values() for part in (weight.values, weight.positions)]
    if len(set(parts)) != len(parts):
        raise ValueError("two of its weights are stored in the same tensor")
    for name, weight in schema.weights.items():
        _require_stored(opened, names, name, weight)
    named = (names - set(parts)) | schema.weights.keys()
    for name, kept in schema.shared.items():
        if not isinstance(kept, str) or kept not in named or name in named:
            raise ValueError(f"it says that {name!r} is the same as {kept!r}, which can't be")
    patterns, axes = manifest.patterns, manifest.axes
    sites = {parameter_of(site, named | schema.shared.keys()): site for site in patterns}
    for name in sites:
        if name not in named and name not in schema.shared:
            raise ValueError(f"it has no tensor {name}, which its manifest says was converted")
    for name, weight in schema.weights.items():
        site = sites.get(name)
        if site is None or (patterns[site], axes[site]) != (weight.pattern, weight.axis):
            raise ValueError(f"its manifest and its header {SCHEMA_KEY} say different things of {name!r}")


def _require_stored(opened: Any, names: set[str], name: str, weight: CompressedWeight) -> None:
    if name in names:
        raise ValueError(f"it holds {name!r} twice, compressed and dense")
    wanted = ((weight.values, weight.dtype, weight.values_shape), (weight.positions, "U8", weight.positions_shape))
    for part, dtype, shape in wanted:
        if part not in names:
            raise ValueError(f"it has no tensor {part!r}, which {name!r} is stored in")
        real = opened.get_slice(part)
        if (real.get_dtype(), tuple(real.get_shape())) != (dtype, shape):
            raise ValueError(
                f"{part} is {real.get_dtype()} {list(real.get_shape())}; a weight {list(weight.shape)} at "
                f"{weight.pattern} needs {dtype} {list(shape)}"
            )


def _decompressed(tensors: dict[str, Tensor], schema: Schema) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give all tensors by their names in the ``state_dict``, and what is wrong with those that are missing."""
    parts = {part for weight in schema.weights.values() for part in (weight.values, weight.positions)}
    dense = {name: tensor for name, tensor in tensors.items() if name not in parts}
    damaged = {}
    for name, weight in schema.weights.items():
        try:
            dense[name] = weight.dense(tensors)
        except PatternError as error:
            damaged[name] = str(error)
    dense |= {name: dense[kept] for name, kept in schema.shared.items() if kept in dense}
    return dense, damaged


def _failed(name: str, weight: CompressedWeight, finding: str) -> WeightCheck:
    kind, density = f"{len(weight.shape)}-D", weight.pattern.density
    return WeightCheck(
        name, kind, weight.shape, str(weight.pattern), True, False, density, finding, "its positions are damaged"
    )
