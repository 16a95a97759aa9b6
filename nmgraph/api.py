"""The front door: what ``import nmgraph`` offers, each name a few calls into the floors below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from nmgraph.checkpoint.dense_file import make_model, open_dense, state_of
from nmgraph.checkpoint.factory import load_weights
from nmgraph.checkpoint.hugging_face import find_hugging_face_manifest, open_hugging_face
from nmgraph.checkpoint.hugging_face_write import require_hugging_face, write_hugging_face
from nmgraph.checkpoint.nm_file import is_nm_file, read_nm_file, write_nm_file
from nmgraph.checkpoint.tensors import load_compressed, verify_safetensors
from nmgraph.checkpoint.trusted import load_trusted
from nmgraph.errors import ConversionError, ExportError, FileError
from nmgraph.export.inputs import Inputs, find_inputs, make_inputs
from nmgraph.export.semi_structured import Acceleration, accelerate_linears
from nmgraph.export.trt_machine import require_tensorrt
from nmgraph.export.trt_rules import parse_projection, require_sparse_sites
from nmgraph.files import require_writable
from nmgraph.layers.kinds import is_layer
from nmgraph.layers.masked import class_name, masked_weights, unmask_all
from nmgraph.layers.recipe import Recipe
from nmgraph.methods import find_preset, make_method
from nmgraph.methods.contract import Method, Preset
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.eligibility import find_sites
from nmgraph.passes.finalize import fold, require_finished, require_whole_recipes
from nmgraph.passes.fold_batchnorm import fold_batchnorms
from nmgraph.passes.hardware import allow_hardware
from nmgraph.passes.manifest import Manifest, find_manifest, require_manifest, write_manifest
from nmgraph.passes.permute_channels import ChannelPlan, plan_permutation, require_same_answer
from nmgraph.passes.projection import Projection
from nmgraph.passes.projection import project as project_sites
from nmgraph.passes.rewrite import Plan, Selection, decide, require_finite, require_some, restrict, rewrite
from nmgraph.passes.structure import (
    blends_buffers,
    copy_structure,
    duplicate,
    find_sharded,
    parameter_of,
    share_parameters,
    unwrapped,
)
from nmgraph.passes.trace import USUAL, Tracing, trace_both_modes, uses
from nmgraph.passes.verification import Verification, verify_model, verify_tensors
from nmgraph.passes.watch import prefer, watch
from nmgraph.training.controller import Controller

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from nmgraph.export.bundle import ExportReport

Progress = Callable[[str], None]


_EVERYTHING = Selection()


def silent(stage: str) -> None:
    """Be the progress of who wants none."""


def convert(
    model: nn.Module,
    *,
    method: str | Method[Any] = "lbc",
    pattern: str | Pattern = "2:4",
    example_inputs: Any = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    layers: Mapping[str, str | Pattern] | None = None,
    keep_dense: Sequence[str] | None = None,
    block_axis: str | None = None,
    preset: str | None = None,
    permute_channels: bool = False,
    mode: str = "auto",
    hardware: str = "auto",
    tracer: fx.Tracer | None = None,
    concrete_args: dict[str, Any] | None = None,
    progress: Progress = silent,
    **method_options: Any,
) -> nn.Module:
    """Make a model's linear and convolution layers sparse-trainable.

    The model is changed in place and returned: its layers multiply by masked weights from now on, everything else
    about it - class, attributes, parameters, ``state_dict`` keys - is as before. On an error it is left untouched.

    Args:
        model: any module.
        method: a name in ``METHODS``, or a configured method.
        pattern: N:M, N of every M consecutive weights kept along the input channels.
        example_inputs: a tensor, a tuple of tensors or a dict of tensors. The dense model is run on them first: the
            manifest then knows how often each layer is called, a GraphModule is held to the same answer, and the
            export remembers the shapes.
        skip: globs on qualified names of layers to leave dense.
        include: globs on names of layers to convert that are left dense by default: grouped convolutions, frozen
            weights (with a fixed mask by magnitude), and weights that several modules share (masked in all of them).
        layers: patterns by glob; of several that match a layer, the last one counts.
        keep_dense: ``"stem"`` and ``"head"``: leave the layers at the model's ends dense, as the papers do.
        block_axis: ``"channels"``, the default, or ``"flat"``: blocks of a convolution run along its kernel window
            and then over channels, as in published results of SR-STE and Bi-Mask; TensorRT cannot use these.
        preset: published settings of the method by name, such as ``"paper"``; what is given beside it counts more.
        permute_channels: first give channels the order in which the masks keep most magnitude, wherever the graph shows
            that the model's answer stays the same. Its weights are then no longer in the order of the dense checkpoint.
        mode: ``"auto"`` changes layers in place; ``"graph"`` returns a whole ``torch.fx.GraphModule`` that shares
            the model's parameters, and leaves the model itself as it was.
        hardware: ``"auto"`` trains layers on sparse tensor cores where these are faster, in half precision, on a GPU
            that has them; ``"force"`` wherever it is possible, faster or not, and is an error where there are none;
            ``"off"`` nowhere. ``nmgraph.hardware(model)`` says what was chosen. Files do not hold it: ``load`` asks again.
        tracer: a tracer of your own for the model as a whole, such as one with other leaves.
        concrete_args: arguments of the forward to fix while tracing, as ``torch.fx.symbolic_trace`` takes them.
        progress: called with what begins.
        **method_options: options of the method, as ``nmgraph methods`` lists them.

    Returns:
        The model, or with ``mode="graph"`` a GraphModule.

    Raises:
        NMGraphError: a subclass naming the layer, the value and the remedy.

    Examples:
        >>> import torch, nmgraph
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> print(nmgraph.manifest(nmgraph.convert(net, method="lbc")))
        2 sites converted, 0 skipped, 100.0% of their weights
    """
    if mode not in ("auto", "graph"):
        raise ConversionError(f'there is no mode {mode!r}. Use "auto" (in place) or "graph" (a GraphModule).')
    require_plain(model)
    published = find_preset(method, preset) if preset else None
    recipe = recipe_of(method, pattern, published, method_options)
    selection = select(skip, include, layers, keep_dense, block_axis, published)
    inputs = None if example_inputs is None else make_inputs(example_inputs)
    how = Tracing(tracer, concrete_args)
    planned = plan(model, recipe, selection, inputs=inputs, how=how, progress=progress)
    require_some(planned.decisions, model)
    require_finite(planned.decisions)
    dense = model
    if mode == "graph":
        model = _as_graph(model, inputs, how)
        planned = replace(planned, decisions=tuple(restrict(planned.decisions, model)))
    order = None
    if permute_channels:
        progress("permuting channels")
        order = permute(dense, planned, inputs)
    progress("rewriting layers")
    try:
        rewrite(model, planned.recipes)
        _require_masks_read(model, planned)
        allow_hardware(model, hardware)
    except BaseException:
        unmask_all(model)
        if order is not None:
            order.undo()
        raise
    written = planned.manifest(() if inputs is None else inputs.shapes())
    write_manifest(model, written if order is None else replace(written, channel_order=order.report.regions))
    return model


def _require_masks_read(model: nn.Module, planned: Plan) -> None:
    """Refuse a model whose forward gets at a bare parameter past its mask, through ``_parameters`` or ``parameters()``.

    Raises:
        ConversionError: naming it.
    """
    bare = {d.site.name for d in planned.decisions if d.refusal is None and d.site.bare}
    if not bare or isinstance(model, fx.GraphModule):
        return
    names = dict(model.named_parameters())
    parameters = {parameter_of(name, names) for name in bare}
    for use in uses(model).products:
        if use.parameter in parameters and use.function != "embedding" and not use.computed:
            raise ConversionError(
                f"{type(model).__name__} reads {use.parameter} past its mask ({use.function} gets the parameter itself). Read it "
                f"as an attribute of its module, or leave it dense with --skip {use.parameter}."
            )


def permute(model: nn.Module, planned: Plan, inputs: Inputs | None = None) -> ChannelPlan:
    """Permute the channels of a dense model in place, for the masks that its sites will have.

    Raises:
        ConversionError: if the model answers otherwise on the inputs then; it is left as it was.
    """
    order = plan_permutation(model, planned.decisions, planned.calls)
    if inputs is None:
        order.apply()
        return order
    before = inputs.outputs(copy_structure(model, share_parameters).eval())
    order.apply()
    try:
        require_same_answer(
            before, inputs.outputs(copy_structure(model, share_parameters).eval()), type(model).__name__
        )
    except BaseException:
        order.undo()
        raise
    return order


def select(
    skip: Sequence[str],
    include: Sequence[str],
    layers: Mapping[str, str | Pattern] | None,
    keep_dense: Sequence[str] | None,
    block_axis: str | None,
    preset: Preset | None,
) -> Selection:
    """Put together which sites become what; what is not given is the preset's."""
    usual = preset or Preset({}, "", keep_dense=())
    keep_dense = [keep_dense] if isinstance(keep_dense, str) else keep_dense
    return Selection(
        [skip] if isinstance(skip, str) else skip,  # a string is a sequence, too: of its letters
        [include] if isinstance(include, str) else include,
        {glob: Pattern.parse(p) for glob, p in (layers or {}).items()},
        usual.keep_dense if keep_dense is None else keep_dense,
        block_axis or usual.block_axis,
    )


def plan(
    model: nn.Module,
    recipe: Recipe,
    selection: Selection = _EVERYTHING,
    *,
    inputs: Inputs | None = None,
    how: Tracing = USUAL,
    progress: Progress = silent,
) -> Plan:
    """Decide for every site what ``convert`` would make of it, and change nothing.

    Raises:
        ConversionError: if the model is converted already, or does not take the inputs.
    """
    found = find_manifest(model)
    converted = masked_weights(model)
    if converted:
        said = (
            f"is converted already ({found.method}: {found})"
            if found
            else f"holds sparse layers ({', '.join(converted)})"
        )
        raise ConversionError(f"{class_name(model)} {said}. Convert a dense model, or finalize this one first.")
    progress("tracing")
    used = uses(model, how)
    calls = None
    if inputs is not None:
        lazy = find_lazy(model)
        if lazy:
            raise ConversionError(
                f"{lazy} has no shape yet: its layer is lazy. Run the model once on the inputs before."
            )
        ran = watch(model, inputs.call)
        calls = ran.calls
        used.calls, used.macs, used.unfollowed = ran.calls, ran.macs, []
        used.products = prefer(ran.uses, used.products)
    decisions = decide(find_sites(model, used), used, recipe, selection)
    return Plan(recipe.method.name, tuple(decisions), used.untraced, calls)


def recipe_of(
    method: str | Method[Any], pattern: str | Pattern, preset: Preset | None, options: Mapping[str, Any]
) -> Recipe:
    """Make the recipe of what was asked for; what is not said is the preset's."""
    return Recipe(make_method(method, {**(preset.options if preset else {}), **options}), Pattern.parse(pattern))


def find_lazy(model: nn.Module) -> str | None:
    """Name a parameter that gets its shape in the first run."""
    return next((name for name, p in model.named_parameters() if is_lazy(p)), None)


def attach(model: nn.Module, optimizer: Optimizer, *, total_steps: int) -> Controller:
    """Hook a converted model to its optimizer; the training loop stays as it is.

    Args:
        model: a converted model, or any module with sparse layers in it.
        optimizer: any torch optimizer made from the model's parameters; nothing about it is changed.
        total_steps: optimizer steps of the whole run, those before a resume included. Schedules are fractions of it.

    Returns:
        A controller, which need not be kept: all state is in the model. Its ``update()`` goes before gradients are
        clipped; its ``check_ranks()`` compares the masks of all processes.

    Raises:
        TrainingError: if model and optimizer do not belong together.
    """
    return Controller(model, optimizer, total_steps)


def manifest(model: nn.Module) -> Manifest:
    """Give the record of what was converted, what was skipped, and why.

    Raises:
        ConversionError: if the model was not converted.
    """
    return require_manifest(model)


def finalize(model: nn.Module, *, force: bool = False) -> nn.Module:
    """Fold the masks into a copy of the model: ordinary layers of the original classes, exact zeros.

    Args:
        model: a converted model, which is not changed; a wrapper around it (torch.compile, DDP, an average) is left away.
        force: prune by what the method knows by now, if its masks are not N:M yet.

    Raises:
        ConversionError: if the model was not converted.
        UnfinishedError: if masks are not N:M yet, saying what is missing.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"a {type(model).__name__} can't be finalized; {_model_inside(model)}")
    blended = blends_buffers(model)
    model = unwrapped(model)
    require_manifest(model)
    require_gathered(model)
    if not masked_weights(model):
        raise ConversionError(f"{type(model).__name__} is finalized already.")
    if not (force or blended):
        require_finished(model)
    finished = copy_structure(model, duplicate)
    fold(finished, blended=blended)
    return finished


def verify(
    model_or_path: nn.Module | str | Path,
    pattern: str | Pattern | None = None,
    *,
    model: nn.Module | str | None = None,
    trust: Sequence[str] = (),
) -> Verification:
    """Check that weights keep to their pattern, and say which are ready for TensorRT's 2:4 sparse tactics.

    Args:
        model_or_path: a module, a ``.pt``, ``.nm.pt``, ``.safetensors`` or ``.onnx`` file, or a Hugging Face directory.
        pattern: to check against; by default each site's own as recorded, or 2:4 for all weights it fits.
        model: for a file that does not hold its module: the dense model, or what makes it, as for ``load``.
        trust: packages whose pickled classes may be loaded, besides the usual.

    Raises:
        FileError: if the file cannot be read.
    """
    wanted = None if pattern is None else Pattern.parse(pattern)
    if isinstance(model_or_path, nn.Module):
        return verify_model(model_or_path, wanted)
    path = Path(model_or_path)
    if path.is_dir():
        whole, _ = open_hugging_face(path)
        recorded = find_hugging_face_manifest(path)
        if recorded is not None:
            write_manifest(whole, recorded)
        return verify_model(whole, wanted)
    if path.suffix == ".onnx":
        from nmgraph.export.proof import load_onnx, verify_onnx

        return verify_onnx(load_onnx(path), path.name, wanted)
    if path.suffix == ".safetensors":
        return verify_safetensors(path, wanted)
    content = load_trusted(path, str(path), trust)
    if is_nm_file(content):
        return verify_model(read_nm_file(content, str(path), _made(model, trust), trust), wanted)
    if isinstance(content, nn.Module):
        return verify_model(content, wanted)
    if isinstance(model, str):
        return verify_model(open_dense(path, factory=model, trust=trust), wanted)
    state, dense = state_of(content, path), model
    if dense is None:
        return verify_tensors(path.name, state, wanted)
    load_weights(dense, state, str(path))
    return verify_model(dense, wanted)


def export(
    model: nn.Module,
    directory: str | Path,
    *,
    example_inputs: Any = None,
    onnx: bool = True,
    trt: bool = False,
    compare: bool = True,
    trt_command: bool = False,
    project: str | Pattern | None = None,
    safetensors: bool = False,
    hf: bool = False,
    precision: str = "fp32",
    dynamic_batch: bool = False,
    fold_batchnorm: bool = False,
    force: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """Finalize a converted model, write it, and prove what was written.

    Args:
        model: a converted or finalized model, which is not changed.
        directory: what to make; it appears whole or not at all.
        example_inputs: a tensor, a tuple of tensors or a dict of tensors; by default those of the conversion, or
            the usual ones for the model's first layer if it takes them.
        onnx: write ``model.onnx``, prove N:M on it and compare it in ONNX Runtime.
        trt: build a TensorRT engine with sparse tactics allowed, and its dense twin; needs TensorRT and a GPU.
        compare: False builds no dense twin.
        trt_command: put the ``trtexec`` line that builds the engine on another machine into the report.
        project: ``"2:4"`` prunes sparse layers that TensorRT's sparse tactics could not take (such as 4:8) further, by
            magnitude; the report says what that took away.
        safetensors: write the weights as ``model.safetensors``, of converted ones only what they keep; ``load`` and
            ``verify`` read it.
        hf: write a Hugging Face model as the directory ``hf/`` that ``from_pretrained`` reads, and read it back.
        precision: of the written weights: ``fp32``, ``fp16`` or ``bf16``.
        dynamic_batch: leave the length of the inputs' first axis open in the ONNX file.
        fold_batchnorm: fold batch norms into the convolutions before them.
        force: prune unfinished masks by what the method knows; the report names them.
        overwrite: replace an earlier export in ``directory``.
        progress: called with what begins; of an engine's build also with how far it is, after a colon.

    Returns:
        A report; its ``holds`` tells whether every check held.

    Raises:
        NMGraphError: if nothing could be written.
    """
    tensorrt = require_tensorrt() if trt else None
    target = None if project is None else parse_projection(project)
    if (trt or trt_command) and not onnx:
        raise ExportError("a TensorRT engine is built from the ONNX file: leave onnx on (no --no-onnx).")
    if not compare and not trt:
        raise ExportError("there is no engine to compare: --no-compare (compare=False) goes with --trt.")
    if dynamic_batch and not onnx:
        raise ExportError("there is no ONNX file to leave a batch open in: leave onnx on (no --no-onnx).")
    if fold_batchnorm and (safetensors or hf):
        raise ExportError(
            "weights with batch norms folded into them fit the dense model no more: export safetensors or hf without "
            "fold_batchnorm (--fold-batchnorm), or ONNX alone with it."
        )
    if not (onnx or safetensors or hf):
        raise ExportError("there is nothing to export: leave onnx on, or ask for safetensors.")
    # Only here: onnx and onnxruntime take a second to import.
    from nmgraph.export.bundle import dtype_of, require_export_directory, write_bundle
    from nmgraph.export.trt_report import TensorRT

    dtype, directory = dtype_of(precision, onnx), Path(directory)
    require_writable(directory, overwrite=overwrite)
    require_export_directory(directory)
    given, model = model, unwrapped(model)
    recorded = require_manifest(model)
    if hf:
        require_hugging_face(model)
    if trt or trt_command:
        require_sparse_sites(recorded, projected=target is not None)
    progress("finalizing")
    sparse = masked_weights(model)
    # Without force, finalize refuses what is unfinished.
    pruned = tuple(name for name, layer in sparse.items() if layer.unfinished()) if force else ()
    finished = finalize(given, force=force) if sparse else copy_structure(model, duplicate)
    projected: tuple[Projection, ...] = ()
    if target is not None:
        projected, recorded = project_sites(finished, recorded, target)
        write_manifest(finished, recorded)
    finished = finished.cpu().eval()
    folded = _fold_batchnorms(finished, recorded, example_inputs) if fold_batchnorm else ()
    finished = finished.to(dtype)
    inputs = _inputs_for(finished, recorded, example_inputs, dtype) if onnx else None
    return write_bundle(
        finished,
        directory,
        recorded,
        inputs=inputs,
        precision=precision,
        safetensors=safetensors,
        pruned=pruned,
        projected=projected,
        dynamic_batch=dynamic_batch,
        folded=folded,
        tensorrt=TensorRT(tensorrt, compare) if trt or trt_command else None,
        write_hf=partial(write_hugging_face, manifest=recorded) if hf else None,
        progress=progress,
    )


def _inputs_for(model: nn.Module, recorded: Manifest, given: Any, dtype: torch.dtype) -> Inputs:
    """Give the inputs of an export, on the CPU and tried."""
    if given is None:
        return find_inputs(model, recorded, dtype)
    inputs = make_inputs(given).on_cpu(dtype)
    inputs.call(copy_structure(model, share_parameters))  # wrong ones are said here, in plain words
    return inputs


def _fold_batchnorms(model: nn.Module, recorded: Manifest, example_inputs: Any) -> tuple[str, ...]:
    """Fold in place, and hold the model to its answer from before."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = _inputs_for(model, recorded, example_inputs, dtype)
    before = copy_structure(model, duplicate)
    folded = fold_batchnorms(model)
    if not inputs.same_answer(before, copy_structure(model, share_parameters)):
        raise ExportError(
            f"{type(model).__name__} answers otherwise once its batch norms are folded. Export it without --fold-batchnorm."
        )
    return folded


def accelerate(model: nn.Module, *, example_inputs: Any) -> Acceleration:
    """Let a finalized model's 2:4 linear layers run on sparse tensor cores in PyTorch, wherever that is faster.

    Each layer is timed at the shape it is called with, dense against sparse, and changed in place only if it wins. On a
    CPU nothing is changed, and every layer says why.

    Args:
        model: finalized, on the GPU, in half precision.
        example_inputs: a tensor, a tuple of tensors or a dict of tensors, on the model's device.

    Raises:
        ConversionError: if the model is not finalized.
        ExportError: if it does not take the inputs.
    """
    return accelerate_linears(model, make_inputs(example_inputs))


def save(model: nn.Module, path: str | Path, *, factory: str | None = None) -> None:
    """Write a converted model to a ``.nm.pt`` file, replacing an old one in one step.

    Args:
        model: a converted model.
        path: where to.
        factory: what makes the dense model, for classes that cannot be pickled: ``"pkg.mod:function"``, or
            ``"timm:NAME"`` or ``"torchvision:NAME"``, which ``load`` then makes without being told again.

    Raises:
        ConversionError: if an average has blended its buffers, so that what it is could not be read back.
        FileError: if it cannot be written; an old file is unchanged then.
    """
    path, model = Path(path), unwrapped(model)
    require_writable(path, overwrite=True)
    require_gathered(model)
    require_whole_recipes(model)
    write_nm_file(model, path, factory)


def load(
    path: str | Path, *, model: nn.Module | str | None = None, trust: Sequence[str] = (), hardware: str = "auto"
) -> nn.Module:
    """Read a converted model from a ``.nm.pt`` file, ready to train on; or a finalized one from ``.safetensors``.

    Args:
        path: the file; a ``.safetensors`` one as ``export`` writes it.
        model: the dense model to convert and load into, instead of the one in the file; or what makes it:
            ``"timm:NAME"``, ``"torchvision:NAME"``, ``"pkg.mod:factory"``, or the path of a dense model. For a
            ``.safetensors`` file it has to be given: its weights are replaced, its dtype and device stay.
        trust: packages whose pickled classes may be loaded, besides torch, torchvision, timm and transformers;
            ``torch.export`` allows exported programs (``.pt2``).
        hardware: as for ``convert``.

    Raises:
        FileError: if the file cannot be read or does not fit the model.
        UntrustedError: listing what it names outside the trusted packages; nothing of it was imported.
    """
    if Path(path).suffix == ".safetensors":
        return load_compressed(Path(path), _made(model, trust))
    content = load_trusted(Path(path), str(path), trust)
    if not is_nm_file(content):
        raise FileError(
            f"{path} is no converted model. Make one with nmgraph.convert and nmgraph.save, or `nmgraph convert {path}`."
        )
    loaded = read_nm_file(content, str(path), _made(model, trust), trust)
    allow_hardware(loaded, hardware)
    return loaded


def _made(model: nn.Module | str | None, trust: Sequence[str]) -> nn.Module | None:
    return make_model(model, trust) if isinstance(model, str) else model


def require_plain(model: Any) -> None:
    """Make sure that it is a module whose layers can be changed.

    Raises:
        ConversionError: saying what it is instead.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"a {type(model).__name__} can't be converted; {_model_inside(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError(
            f"{type(model).__name__} is TorchScript, whose layers can't be changed. Convert the Python model."
        )
    inner = unwrapped(model)
    if inner is not model:
        raise ConversionError(
            f"the model is wrapped in {type(model).__name__}. Convert the {type(inner).__name__} inside first, and wrap it after."
        )
    sharded = find_sharded(model)
    if sharded:
        raise ConversionError(f"{sharded}. Convert the model before it is sharded, and shard it after.")


def require_gathered(model: nn.Module) -> None:
    """Make sure that no weight lies in parts on several processes.

    Raises:
        ConversionError: saying how to gather it.
    """
    sharded = find_sharded(model)
    if sharded:
        raise ConversionError(
            f"{sharded}. Gather it first, into a model that is converted the same way: "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict, and load_state_dict on one process."
        )


def _model_inside(value: Any) -> str:
    """Say which attribute of what is no module holds the model: a Trainer's, a pipeline's."""
    held = [name for name, inner in getattr(value, "__dict__", {}).items() if isinstance(inner, nn.Module)]
    # A Trainer holds it twice: bare, and as it is wrapped for training.
    names = ["model"] if "model" in held else held
    if names:
        return f"it holds the model: give its .{' or .'.join(names)}."
    return "give a torch.nn.Module."


def _as_graph(model: nn.Module, inputs: Inputs | None, how: Tracing) -> fx.GraphModule:
    traced = trace_both_modes(model, how)
    assert traced.graph is not None
    graph_module = fx.GraphModule(traced.root, traced.graph, type(model).__name__)
    for node in traced.graph.nodes:
        # fx copies a parameter that the forward reads, not the layer around it, which has to mask it.
        owner = str(node.target).rpartition(".")[0]
        if node.op == "get_attr" and is_layer(traced.root.get_submodule(owner)):
            graph_module.add_submodule(owner, traced.root.get_submodule(owner))
    copies = [copy_structure(m, share_parameters).eval() for m in (model, graph_module)]
    if inputs is not None and not inputs.same_answer(*copies):
        raise ConversionError(
            f"the graph of {type(model).__name__} does not answer as the model does: its forward depends on values "
            'that a graph bakes in. Use mode="auto".'
        )
    return graph_module
