"""Write a model as ONNX through ``torch.export``."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.utils._pytree import tree_map

from nmgraph.errors import ExportError, first_line
from nmgraph.export.inputs import Inputs
from nmgraph.export.onnx_stream import save_streamed
from nmgraph.passes.manifest import MANIFEST_KEY, Manifest
from nmgraph.passes.structure import parameter_of

SITES_KEY = "nmgraph.sites"  # {initializer: [site, ...]}
_STACK_TRACE = "pkg.torch.onnx.stack_trace"
INLINE_LIMIT = 1 << 30  # bytes; a protobuf file ends at 2 GiB


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let a language model answer without its key and value cache, whose class neither exporter nor parity knows."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    cached = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True


def write_onnx(
    model: nn.Module, inputs: Inputs, path: Path, manifest: Manifest | None, *, dynamic_batch: bool = False
) -> None:
    """Export a finalized model, with its manifest in the file's metadata.

    Args:
        model: ordinary layers, in eval mode.
        inputs: what to trace with; the file takes inputs of these shapes.
        dynamic_batch: leave the length of their first axis open.
        path: of the ``.onnx`` file; weights beyond 1 GiB go to ``<path>.data`` beside it.
        manifest: of the conversion.

    Raises:
        ExportError: if torch.export cannot follow the model.
    """
    if dynamic_batch:
        inputs = inputs.with_batch(2)  # a length of 1 would be taken for a constant
    try:
        shapes = _open_batch(model, inputs) if dynamic_batch else None
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, inputs.args, kwargs=inputs.kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False
            )
    except Exception as error:
        # torch.export and the exporter raise many kinds; all mean that this model is not exportable as it is.
        cause = error.__cause__ or error
        raise ExportError(
            f"{type(model).__name__} can't be exported to ONNX: {first_line(cause)} "
            f"({type(cause).__name__}). The dense model has to export with torch.onnx.export(dynamo=True) first."
        ) from error
    assert program is not None
    _forget_where(program.model)
    if manifest is not None:
        tensors = {name: value.const_value for name, value in program.model.graph.initializers.items()}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
        sites = name_sites(arrays, model, [e.name for e in manifest.converted])
        program.model.metadata_props.update({MANIFEST_KEY: manifest.to_json(), SITES_KEY: json.dumps(sites)})
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size > INLINE_LIMIT:
        program.save(str(path), external_data=True)
    else:
        save_streamed(program.model, path)


def _forget_where(model: ir.Model) -> None:
    """Take out the stack traces of the exporter: paths of the machine it ran on are nobody else's concern."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.pop(_STACK_TRACE, None)


def _open_batch(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Say of every argument of the forward, as torch.export wants it, that its first axis is open."""
    batch = torch.export.Dim("batch")
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: tree_map(lambda _: {0: batch}, value) for name, value in bound.arguments.items()}


def name_sites(initializers: Mapping[str, np.ndarray], model: nn.Module, sites: Sequence[str]) -> dict[str, list[str]]:
    """Tell which initializer holds which sites' weights: by name where the exporter kept it, else by content.

    Constant folding renames a weight when it transposes it, so the content is compared straight and transposed. Of
    equal weights each site gets an initializer of its own as far as there are enough: an exporter may merge them. A site
    may have several, each a part of its weight.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {site: parameter_of(site, parameters) for site in sites}
    named = {name: [site] for site, name in names.items() if name in initializers}
    waiting: dict[Hashable, list[str]] = defaultdict(list)
    for site in sites:
        if names[site] not in named:
            weight = parameters[names[site]].detach().float().numpy()
            waiting[_content(weight)].append(site)
    for name, values in initializers.items():
        if name not in named:
            content = next((c for c in _contents(values) if waiting.get(c)), None)
            if content is not None:
                named[name] = [waiting[content].pop(0)]
    for content, merged in waiting.items():
        holder = next((n for n, v in initializers.items() if merged and content in _contents(v)), None)
        if holder is not None:
            named[holder] += merged
    # What else constant folding made of them: turned for another product, or cut.
    rest = {name: values for name, values in initializers.items() if name not in named and values.ndim >= 2}
    for site in sites:
        whole = parameters[names[site]].detach().float().numpy() if rest else None
        for name in [name for name, values in rest.items() if whole is not None and _is_from(values, whole)]:
            named.setdefault(name, []).append(site)
    return named


def _is_from(values: np.ndarray, weight: np.ndarray) -> bool:
    """Tell whether values are a weight, turned or not, or some rows or one matrix of it."""
    if values.size == weight.size:
        return values.ndim == weight.ndim and any(
            turned.shape == values.shape and np.array_equal(turned, values.astype(np.float32))
            for turned in _turns(weight)
        )
    return values.size < weight.size and _is_part(values, weight)


def _turns(values: np.ndarray) -> tuple[np.ndarray, ...]:
    return (values, values.T, values.swapaxes(-1, -2)) if values.ndim > 2 else (values, values.T)


def _is_part(values: np.ndarray, weight: np.ndarray) -> bool:
    """Tell whether a matrix is some rows of a weight, or one of a stack: constant folding splits these."""
    rows = weight.reshape(-1, weight.shape[-1])
    for part in (values, values.T) if values.ndim == 2 else ():
        if 0 < len(part) < len(rows) and part.shape[1] == rows.shape[1]:
            part = part.astype(np.float32)
            begins = np.flatnonzero((rows == part[0]).all(1))
            if any(np.array_equal(rows[i : i + len(part)], part) for i in begins):
                return True
    return False


def _contents(values: np.ndarray) -> tuple[Hashable, ...]:
    return tuple(map(_content, _turns(values))) if values.ndim >= 2 else ()


def _content(values: np.ndarray) -> Hashable:
    return values.shape, hashlib.sha256(np.ascontiguousarray(values, dtype=np.float32).tobytes()).digest()


def read_manifest(model: onnx.ModelProto) -> Manifest | None:
    """Find the manifest in an ONNX file's metadata."""
    for prop in model.metadata_props:
        if prop.key == MANIFEST_KEY:
            return Manifest.from_json(prop.value)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter prints and logs, on many loggers of its own making; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
