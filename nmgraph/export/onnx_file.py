"""Write a model as ONNX through ``torch.export``."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from nmgraph.errors import ExportError, first_line
from nmgraph.export.inputs import Inputs
from nmgraph.passes.manifest import Manifest

MANIFEST_KEY = "nmgraph.manifest"
SITES_KEY = "nmgraph.sites"  # {initializer: site}
INLINE_LIMIT = 1 << 30  # bytes; a protobuf file ends at 2 GiB


def write_onnx(model: nn.Module, inputs: Inputs, path: Path, manifest: Manifest | None) -> None:
    """Export a finalized model, with its manifest in the file's metadata.

    Args:
        model: ordinary layers, in eval mode.
        inputs: what to trace with; the file takes inputs of these shapes.
        path: of the ``.onnx`` file; weights beyond 1 GiB go to ``<path>.data`` beside it.
        manifest: of the conversion.

    Raises:
        ExportError: if torch.export cannot follow the model.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, inputs.args, kwargs=inputs.kwargs, dynamo=True, verbose=False)
    except Exception as error:
        # torch.export and the exporter raise many kinds; all mean that this model is not exportable as it is.
        cause = error.__cause__ or error
        raise ExportError(
            f"{type(model).__name__} can't be exported to ONNX: {first_line(cause)} "
            f"({type(cause).__name__}). The dense model has to export with torch.onnx.export(dynamo=True) first."
        ) from error
    assert program is not None
    if manifest is not None:
        tensors = {name: value.const_value for name, value in program.model.graph.initializers.items()}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
        sites = name_sites(arrays, model, [e.name for e in manifest.converted])
        program.model.metadata_props.update({MANIFEST_KEY: manifest.to_json(), SITES_KEY: json.dumps(sites)})
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    program.save(str(path), external_data=size > INLINE_LIMIT)


def name_sites(initializers: Mapping[str, np.ndarray], model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """Tell which initializer holds which site's weight: by name where the exporter kept it, else by content.

    Constant folding renames a weight when it transposes it, so the content is compared straight and transposed.
    """
    weights = {site: np.asarray(model.get_submodule(site).get_parameter("weight").detach().float()) for site in sites}
    by_content = {_fingerprint(w): site for site, w in weights.items()}
    by_content |= {_fingerprint(w.T): site for site, w in weights.items() if w.ndim == 2}
    named = {}
    for name, values in initializers.items():
        site = name.removesuffix(".weight")
        if name != site and site in weights:
            named[name] = site
        elif values.ndim >= 2 and (found := by_content.get(_fingerprint(values))):
            named[name] = found
    return named


def _fingerprint(values: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    contents = np.ascontiguousarray(values, dtype=np.float32).tobytes()
    return values.shape, hashlib.sha256(contents).digest()


def read_manifest(model: onnx.ModelProto) -> Manifest | None:
    """Find the manifest in an ONNX file's metadata."""
    for prop in model.metadata_props:
        if prop.key == MANIFEST_KEY:
            return Manifest.from_json(prop.value)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress messages; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
