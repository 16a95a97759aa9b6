"""Prove N:M on the ONNX file itself, on the axis that each node multiplies along.

The reduction axis in a file is not the one in PyTorch: a Linear becomes ``Gemm(transB=1)`` with the weight as it
was, or a ``MatMul`` with the weight transposed by constant folding. So each Conv, ConvTranspose, Gemm and MatMul is asked for its
axis, and the axis is followed back through what only moves, selects or converts values. Anything else between an initializer
and its product - a Mul, a Where, a TopK - is a mask that was not folded, and fails the proof.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from nmgraph.errors import FileError, NMGraphError, first_line
from nmgraph.export.onnx_file import SITES_KEY, read_manifest
from nmgraph.nm.grouping import FLAT, Axis
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.products import contracted
from nmgraph.passes.verification import DEFAULT, Verification, WeightCheck, check_weight

_PASSES_VALUES = {"Cast", "Identity", "QuantizeLinear", "DequantizeLinear"}
_CONVOLUTIONS = {"Conv": 1, "ConvTranspose": 0}
"""The axis of the weight that is summed over."""
_MOVED_ZERO = "DequantizeLinear with a zero point"
_MASKING = {"Mul", "Where", "TopK", "ScatterElements", "ScatterND", _MOVED_ZERO}
"""Operators that make a mask, or undo one. Others may well compute a constant that is no weight of a layer."""


@dataclass(frozen=True)
class Product:
    """A node that multiplies by a constant weight.

    Attributes:
        node: its name.
        operator: Conv, ConvTranspose, Gemm or MatMul.
        initializer: which holds the weight.
        sites: whose weight that is; none if the layer was left dense.
    """

    node: str
    operator: str
    initializer: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class _Weight:
    """A constant operand of a product: its initializer, and the axis that is summed over in it."""

    node: onnx.NodeProto
    initializer: str
    values: np.ndarray
    axis: int
    groups: int


@dataclass(frozen=True)
class _Computed:
    """A constant operand that is computed from initializers by something that is no mere conversion."""

    node: onnx.NodeProto
    operator: str
    initializers: frozenset[str]


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external data.

    Raises:
        FileError: if it is missing, damaged or not ONNX.
    """
    if not path.exists():
        raise FileError(f"{path} does not exist.")
    try:
        onnx.checker.check_model(str(path), full_check=False)  # by its path: a model in memory would be copied
        model = onnx.load(str(path))
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError, RuntimeError) as error:
        raise FileError(f"{path} can't be read as ONNX: {first_line(error)}.") from error
    return model


def verify_onnx(model: onnx.ModelProto, subject: str, pattern: Pattern | None = None) -> Verification:
    """Check every constant operand of the file's products.

    Args:
        model: a loaded ONNX model.
        subject: what to call it in the result.
        pattern: to check against; default each site's own from the file's manifest, or 2:4 for all it fits.

    Raises:
        FileError: if the graph contradicts itself.
    """
    try:
        return _verified(model, subject, pattern)
    except NMGraphError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        # The checker looks at no attribute's value, and at no tensor's size.
        raise FileError(
            f"{subject} can't be followed as ONNX: {type(error).__name__}: {first_line(error)}. Copy it again, or export again."
        ) from error


def _verified(model: onnx.ModelProto, subject: str, pattern: Pattern | None) -> Verification:
    manifest = read_manifest(model)
    patterns, axes = (manifest.patterns, manifest.axes) if manifest else ({}, {})
    sites = _sites(model)
    checks: list[WeightCheck] = []
    problems: list[str] = []
    found: set[str] = set()
    for operand in _operands(model.graph):
        if isinstance(operand, _Computed):
            masking = manifest is None and operand.operator in _MASKING
            if masking or any(name in sites for name in operand.initializers):
                where = f"{operand.node.op_type} {operand.node.name}"
                problems.append(f"{operand.operator} stands between an initializer and {where}")
            continue
        weight = _tensor(operand.values)
        for site in sites.get(operand.initializer, [""]):
            found.add(site)
            wanted = pattern or patterns.get(site) or DEFAULT
            channels = weight.shape[operand.axis] // (operand.groups if operand.node.op_type == "ConvTranspose" else 1)
            fits = wanted.divides(channels) and operand.groups == 1
            # Along the kernel as the site was trained; the Conv node itself sums over it all the same.
            axis: Axis = FLAT if axes.get(site) == FLAT and operand.node.op_type == "Conv" else operand.axis
            check = check_weight(
                site or operand.initializer, operand.node.op_type, weight, wanted,
                expected=site in patterns or (manifest is None and fits), axis=axis, groups=operand.groups,
            )  # fmt: skip
            checks.append(replace(check, node=operand.node.name))
    lost = [name for name in patterns if name not in found]
    if lost:
        problems.append(
            f"no convolution, Gemm or MatMul uses the weight of {', '.join(lost[:4])}{' ...' if lost[4:] else ''}"
        )
    if not checks:
        problems.append("no convolution, Gemm or MatMul with a constant weight found")
    return Verification(subject, tuple(checks), tuple(problems))


def list_products(model: onnx.ModelProto) -> tuple[Product, ...]:
    """List every node that multiplies by a constant weight, also those that share one."""
    sites, graph = _sites(model), model.graph
    initializers, producers = _constants(graph)
    found = []
    for node in graph.node:
        for name, axis in _products(node):
            weight = _follow(node, name, axis, initializers, producers)
            if isinstance(weight, _Weight) and weight.values.ndim >= 2:
                owners = tuple(sites.get(weight.initializer, ()))
                found.append(Product(node.name, node.op_type, weight.initializer, owners))
    return tuple(found)


def _sites(model: onnx.ModelProto) -> dict[str, list[str]]:
    return next((json.loads(p.value) for p in model.metadata_props if p.key == SITES_KEY), {})


def _constants(graph: onnx.GraphProto) -> tuple[dict[str, onnx.TensorProto], dict[str, onnx.NodeProto]]:
    return {i.name: i for i in graph.initializer}, {output: node for node in graph.node for output in node.output}


def _operands(graph: onnx.GraphProto) -> Iterator[_Weight | _Computed]:
    initializers, producers = _constants(graph)
    seen: set[tuple[str, int]] = set()
    for node in graph.node:
        for name, axis in _products(node):
            operand = _follow(node, name, axis, initializers, producers)
            if isinstance(operand, _Weight):
                if operand.values.ndim < 2 or (operand.initializer, operand.axis) in seen:
                    continue
                seen.add((operand.initializer, operand.axis))
            if operand is not None:
                yield operand


def _products(node: onnx.NodeProto) -> list[tuple[str, int]]:
    """List the operands of a product that may be weights, with the axis that is summed over; negative from the end."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in _CONVOLUTIONS:
        return [(node.input[1], _CONVOLUTIONS[node.op_type])]
    if node.op_type == "Gemm":
        return [
            (node.input[0], 0 if attributes.get("transA") else 1),
            (node.input[1], 1 if attributes.get("transB") else 0),
        ]
    if node.op_type == "Einsum":
        equation = attributes["equation"].decode()
        places = ((name, contracted(equation, i)) for i, name in enumerate(node.input))
        return [(name, axis) for name, axis in places if axis is not None]
    if node.op_type == "MatMul":
        return [(node.input[0], -1), (node.input[1], -2)]
    return []


def _follow(
    node: onnx.NodeProto, name: str, axis: int,
    initializers: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto],
) -> _Weight | _Computed | None:  # fmt: skip
    steps: list[_Step] = []
    while name not in initializers:
        producer = producers.get(name)
        if producer is None:
            return None  # an input of the graph
        if producer.op_type == "Constant":
            break
        step = _step(producer, initializers, producers)
        if step is None:
            sources = _sources(name, initializers, producers)
            operator = _MOVED_ZERO if producer.op_type == "DequantizeLinear" else producer.op_type
            return None if sources is None else _Computed(node, operator, sources)
        steps.append(step)
        name = producer.input[0]
    values = _values(name, initializers, producers)
    if values is None:
        return None  # no tensor
    axis %= max(values.ndim - sum(step.selects is not None for step in steps), 1)
    dims = values.ndim - sum(step.selects is not None for step in steps)
    for step in steps:
        if step.turns is not None:
            axis = step.turns[axis] if step.turns else dims - 1 - axis
        if step.selects is not None:
            dims += 1
            axis += axis >= step.selects % dims
        if any(cut % dims == axis for cut in step.cuts):
            return _Computed(node, step.operator, frozenset({name} & initializers.keys()))
    groups = next((a.i for a in node.attribute if a.name == "group"), 1) if node.op_type in _CONVOLUTIONS else 1
    return _Weight(node, name, values, axis, groups)


@dataclass(frozen=True)
class _Step:
    """What stands between an initializer and its product, and leaves the values as they are.

    Attributes:
        operator: of the node.
        turns: the permutation of a Transpose, empty if it reverses all axes.
        selects: the axis that selecting one matrix of a stack takes away.
        cuts: the axes of which a part is taken.
    """

    operator: str
    turns: list[int] | None = None
    selects: int | None = None
    cuts: tuple[int, ...] = ()


def _step(
    node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto]
) -> _Step | None:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in _PASSES_VALUES and not _moves_zero(node, initializers):
        return _Step(node.op_type)
    if node.op_type == "Transpose":
        return _Step(node.op_type, turns=list(attributes.get("perm", [])))
    if node.op_type == "Split":
        return _Step(node.op_type, cuts=(attributes.get("axis", 0),))
    if node.op_type == "Slice" and len(node.input) > 3:
        axes = _values(node.input[3], initializers, producers)
        return None if axes is None else _Step(node.op_type, cuts=tuple(axes.reshape(-1).tolist()))
    if node.op_type == "Gather":
        index = _values(node.input[1], initializers, producers)
        return _Step(node.op_type, selects=attributes.get("axis", 0)) if index is not None and not index.ndim else None
    return None


def _values(
    name: str, initializers: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto]
) -> np.ndarray | None:
    if name in initializers:
        return numpy_helper.to_array(initializers[name])
    constant = producers.get(name)
    tensors = [a.t for a in constant.attribute if a.name == "value"] if constant is not None else []
    return numpy_helper.to_array(tensors[0]) if tensors and constant and constant.op_type == "Constant" else None


def _moves_zero(node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[2] not in initializers:
        return False
    return bool(numpy_helper.to_array(initializers[node.input[2]]).any())


def _sources(
    name: str, initializers: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto]
) -> frozenset[str] | None:
    """List the initializers a value is computed from; None if it depends on an input of the graph."""
    pending, seen = [name], set()
    while pending:
        current = pending.pop()
        if not current or current in seen:
            continue
        seen.add(current)
        if current in initializers:
            continue
        if current not in producers:
            return None
        pending.extend(producers[current].input)
    return frozenset(seen & initializers.keys())


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))  # numpy has no bfloat16, and zeros stay zeros
