"""Example inputs: given, written as text, remembered from the conversion, or guessed and tried."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nmgraph.errors import ExportError, first_line
from nmgraph.layers.kinds import is_layer
from nmgraph.layers.masked import class_name
from nmgraph.passes.manifest import Manifest
from nmgraph.passes.structure import copy_structure, share_parameters
from nmgraph.passes.watch import fake_copy, fake_tensors

DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64,
    "int64": torch.int64, "int32": torch.int32, "bool": torch.bool,
}  # fmt: skip
INTEGER_LIMIT = 100
"""Made-up integers stay below this: they are mostly token ids, and every vocabulary has that many."""

GIVEN = "given"
"""The source of inputs that are a person's own."""


@dataclass(frozen=True)
class Inputs:
    """What a model is called with.

    Attributes:
        args: positional tensors, or lists, tuples and dicts of tensors.
        kwargs: the same by name.
        source: where they come from, in words.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str

    def call(self, model: nn.Module) -> Any:
        """Run the model on them, without gradients.

        Raises:
            ExportError: if the model does not take them.
        """
        try:
            with torch.no_grad():
                return model(*self.args, **self.kwargs)
        except Exception as error:
            # The model is foreign code; what it raises on inputs it does not take can be anything.
            raise ExportError(f"{class_name(model)} does not take the inputs {self}: {first_line(error)}") from error

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Run the model, and give all tensors of its answer."""
        return [t for t in tree_leaves(self.call(model)) if isinstance(t, Tensor)]

    def same_answer(self, one: nn.Module, other: nn.Module) -> bool:
        """Tell whether two models, in evaluation mode, give the same tensors."""
        pairs = zip(self.outputs(one), self.outputs(other), strict=True)
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs)

    def shapes(self) -> tuple[tuple[tuple[int, ...], str, str], ...]:
        """List (shape, dtype, name) of each, positional ones without a name; none if one is more than a tensor."""
        if not all(isinstance(t, Tensor) for t in (*self.args, *self.kwargs.values())):
            return ()
        named = [("", t) for t in self.args] + list(self.kwargs.items())
        return tuple((tuple(t.shape), str(t.dtype).removeprefix("torch."), name) for name, t in named)

    def on_cpu(self, dtype: torch.dtype) -> Inputs:
        """Move them to the CPU, and give floating-point ones another dtype."""

        def cast(t: Any) -> Any:
            return t.detach().to("cpu", dtype if t.is_floating_point() else t.dtype) if isinstance(t, Tensor) else t

        return Inputs(tree_map(cast, self.args), tree_map(cast, self.kwargs), self.source)

    def with_batch(self, size: int) -> Inputs:
        """Repeat, or cut, each along its first axis.

        Raises:
            ExportError: if they are not tensors with a first axis of one common length.
        """
        tensors = (*self.args, *self.kwargs.values())
        lengths = {t.shape[0] if isinstance(t, Tensor) and t.dim() else None for t in tensors}
        length = lengths.pop() if len(lengths) == 1 else None
        if length is None:
            raise ExportError(f"the inputs {self} have no batch axis in common, so it can't be left open.")
        places = torch.arange(size) % length
        return Inputs(tuple(t[places] for t in self.args), {k: t[places] for k, t in self.kwargs.items()}, self.source)

    def named(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Give them by the names an exported file has for them, in its order."""
        values = dict(zip(names, self.args, strict=False)) | self.kwargs
        return {name: values[name] for name in names}

    def __str__(self) -> str:
        shapes = [_spell(t) for t in tree_leaves(self.args)]
        shapes += [f"{name}={' '.join(map(_spell, tree_leaves(t)))}" for name, t in self.kwargs.items()]
        return f"{', '.join(shapes)} ({self.source})"


def make_inputs(given: Any) -> Inputs:
    """Turn what a user passes - a tensor, a tuple of arguments, a dict of arguments by name - into inputs.

    An argument may be a tensor, a plain value, or a list, tuple or dict of these.

    Raises:
        ExportError: if it is none of these.
    """
    if isinstance(given, Inputs):
        return given
    if isinstance(given, Tensor):
        return Inputs((given,), {}, GIVEN)
    leaves = tree_leaves(given)
    plain = all(isinstance(leaf, (Tensor, bool, int, float, str, type(None))) for leaf in leaves)
    plain = plain and any(isinstance(leaf, Tensor) for leaf in leaves)
    if isinstance(given, Mapping) and plain:
        return Inputs((), {str(name): t for name, t in given.items()}, GIVEN)
    if isinstance(given, (tuple, list)) and plain:
        return Inputs(tuple(given), {}, GIVEN)
    raise ExportError(
        f"example_inputs is a {type(given).__name__}; it must be a tensor, a tuple of tensors or a dict of tensors by argument name."
    )


def argument_names(model: nn.Module) -> list[str]:
    """List the arguments that a model's forward names."""
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind not in unnamed]


def named_inputs(model: nn.Module, tensors: Mapping[str, Tensor]) -> Inputs:
    """Give tensors to the arguments of the same names; one called ``input`` is the first argument, whatever that is called.

    Floating-point ones get the dtype of the model's own parameters.

    Raises:
        ExportError: if there are none, or one has a name that the forward does not have.
    """
    known, named = argument_names(model), dict(tensors)
    unknown = [name for name in named if known and name not in (*known, "input")]
    if unknown or not named:
        held = f"holds {', '.join(unknown):.200}" if unknown else "holds no input"
        raise ExportError(
            f"the data {held}, and {class_name(model)} takes {', '.join(known) or 'input'}. Name tensors by these; input is "
            "the first one, and labels are the labels."
        )
    first = (named.pop("input"),) if "input" in named and "input" not in known else ()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return Inputs(first, named, GIVEN).on_cpu(dtype)


def parse_inputs(texts: Sequence[str]) -> Inputs:
    """Read ``[NAME=]1x3x224x224[:dtype]`` once per input, and make up random values.

    Raises:
        ExportError: if a text has another form or names an unknown dtype.
    """
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        match = re.fullmatch(r"(?:([A-Za-z_]\w*)=)?([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+))?", text)
        if match is None or (match[3] or "float32") not in DTYPES:
            raise ExportError(
                f"{text!r} is no input. Write [NAME=]SHAPE[:DTYPE], for example 1x3x224x224 or input_ids=1x16:int64; "
                f"dtypes are {', '.join(DTYPES)}."
            )
        tensor = make_up(tuple(map(int, match[2].split("x"))), match[3] or "float32")
        if match[1]:
            kwargs[match[1]] = tensor
        else:
            args.append(tensor)
    return Inputs(tuple(args), kwargs, "values made up")


def find_inputs(model: nn.Module, manifest: Manifest | None, dtype: torch.dtype = torch.float32) -> Inputs:
    """Find inputs the model takes: those it was converted with, or the usual ones for its first layer.

    Raises:
        ExportError: if none of them runs.
    """
    tried = []
    for candidate in _candidates(model, manifest):
        inputs = candidate.on_cpu(dtype)
        try:
            _try(inputs, model)
        except ExportError as error:
            tried.append(str(error))
        else:
            return inputs
    raise ExportError(
        f"{class_name(model)} needs example inputs. Give their shapes, for example --input 1x3x224x224 (in Python "
        "example_inputs=torch.randn(1, 3, 224, 224))." + "".join(f"\n  {t}" for t in tried)
    )


def inputs_of(manifest: Manifest) -> Inputs:
    """Make up inputs of the shapes that a model was converted with."""
    made = [(name, make_up(shape, dtype)) for shape, dtype, name in manifest.inputs]
    return Inputs(tuple(t for name, t in made if not name), {n: t for n, t in made if n}, "as at conversion")


def _try(inputs: Inputs, model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        with fake_tensors() as fakes:
            inputs.call(fake_copy(model, fakes))
    else:
        inputs.call(copy_structure(model, share_parameters))


def _candidates(model: nn.Module, manifest: Manifest | None) -> Iterator[Inputs]:
    if manifest is not None and manifest.inputs:
        yield inputs_of(manifest)
    config = getattr(model, "default_cfg", None)  # timm
    if isinstance(config, Mapping) and config.get("input_size"):
        yield Inputs((make_up((1, *config["input_size"]), "float32"),), {}, "the model's default_cfg")
    yield from _hugging_face(model)
    first = next((m for m in model.modules() if is_layer(m)), None)
    if isinstance(first, nn.Linear):
        yield Inputs((make_up((1, first.in_features), "float32"),), {}, "guessed from the first layer")
    elif isinstance(first, nn.Conv2d):
        for size in (224, 32):
            shape = (1, first.in_channels, size, size)
            yield Inputs((make_up(shape, "float32"),), {}, "guessed from the first layer")


def _hugging_face(model: nn.Module) -> Iterator[Inputs]:
    """Give what a model of transformers says it takes: token ids, or images of its configuration's size."""
    main, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if main == "pixel_values":
        sizes, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        sizes = (sizes, sizes) if isinstance(sizes, int) else sizes
        if isinstance(sizes, (tuple, list)):
            made = make_up((1, channels, *sizes), "float32")
            yield Inputs((), {main: made}, "the model's config")
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and main in dummy and all(isinstance(t, Tensor) for t in dummy.values()):
        yield Inputs((), dict(dummy), "the model's dummy_inputs")


def make_up(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Make a tensor of random values, the same each time.

    Raises:
        ExportError: if there is no memory for it.
    """
    generator = torch.Generator().manual_seed(0)
    kind = DTYPES[dtype]
    try:
        if kind.is_floating_point:
            return torch.randn(shape, generator=generator).to(kind)
        return torch.randint(0, 2 if kind == torch.bool else INTEGER_LIMIT, shape, generator=generator).to(kind)
    except (RuntimeError, TypeError, MemoryError) as error:
        size = "x".join(map(str, shape))
        raise ExportError(f"an input of {size} can't be made: {first_line(error)}") from error


def _spell(t: Any) -> str:
    if not isinstance(t, Tensor):
        return repr(t)
    return "x".join(map(str, t.shape)) + ("" if t.dtype == torch.float32 else f":{str(t.dtype).removeprefix('torch.')}")
