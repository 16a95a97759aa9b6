"""The command line: parses, calls the front door, prints. Every command has --json; results go to stdout, the rest to stderr."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table

import nmgraph
from nmgraph import manual, seeing, suggestions
from nmgraph.checkpoint.dense_file import default_output, read_dense
from nmgraph.checkpoint.named_models import NamedModel
from nmgraph.console import FAILED, FINE, Answer, Commands, answering, progress_bar, typed
from nmgraph.errors import ConversionError, FileError, MethodError
from nmgraph.export.trt_machine import require_tensorrt
from nmgraph.files import require_writable
from nmgraph.layers.masked import masked_weights
from nmgraph.measuring import Measuring
from nmgraph.methods import METHODS, find_preset
from nmgraph.methods.contract import Preset
from nmgraph.options import (
    MODEL,
    OUTPUT,
    SPARSITY,
    TENSORRT,
    BlockAxisOption,
    BudgetOption,
    ConvertedArgument,
    DataOption,
    DebugOption,
    FactoryOption,
    IncludeOption,
    InputOption,
    JsonOption,
    KeepDenseOption,
    LayerOption,
    MethodOption,
    ModelArgument,
    OutOption,
    OverwriteOption,
    PatternOption,
    PresetOption,
    QuietOption,
    RecipeOption,
    SensitivityOption,
    SetOption,
    SkipOption,
    SuggestionOption,
    TrustOption,
    flag,
    option,
)
from nmgraph.passes.permutation_report import PermutationReport
from nmgraph.passes.recipe_file import RecipeFile, read_recipe
from nmgraph.training.standing import standing_of

_EXPORT_STAGES, _ENGINE_STAGES, _CONVERT_STAGES, _INSPECT_STAGES, _REPORT_STAGES = 6, 3, 3, 3, 1

app = typer.Typer(
    name="nmgraph",
    cls=Commands,
    help=manual.SUMMARY,
    epilog=manual.GUIDES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nmgraph {nmgraph.__version__}")
        raise typer.Exit


@app.callback()
def _nmgraph(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass  # the callback holds the options before a command


def main() -> None:
    """Run the command line; modules in the current directory are found, after the installed ones."""
    sys.path.append(os.getcwd())
    # torch's own, when the graph of an exported program is copied.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
    app(prog_name="nmgraph")


@app.command(epilog=manual.METHODS)
def methods(quiet: QuietOption = False, json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the training methods, with their options and costs."""
    with answering(json, quiet, debug) as give:
        rows = [_describe(cls) for cls in METHODS.values()]
        table = Table(header_style="bold", show_lines=True)
        table.add_column("method", no_wrap=True)
        table.add_column("what it does")
        for row in rows:
            lines = [f"{row['title']} ({row['paper']})"]
            lines += [
                f"[dim]{key.removesuffix('_cost')}[/]: {row[key]}" for key in ("gradient", "state_cost", "time_cost")
            ]
            options = (f"{key}={_shown(value, row['choices'].get(key))}" for key, value in row["options"].items())
            lines += [f"[dim]--set[/] {escape('  '.join(options)) or '(no options)'}"]
            lines += [f"[dim]--preset[/] {'|'.join(row['presets'])}"]
            table.add_row(row["name"], "\n".join(lines))
        give(Answer(rows, table, "\n".join(METHODS)))


@app.command(epilog=manual.INSPECT)
def inspect(
    model: ModelArgument,
    factory: FactoryOption = None,
    trust: TrustOption = [],  # noqa: B006 - typer needs the literal
    method: MethodOption = None,
    pattern: PatternOption = None,
    set: SetOption = [],  # noqa: B006
    skip: SkipOption = [],  # noqa: B006
    include: IncludeOption = [],  # noqa: B006
    layer: LayerOption = [],  # noqa: B006
    keep_dense: KeepDenseOption = None,
    block_axis: BlockAxisOption = None,
    preset: PresetOption = None,
    input: InputOption = [],  # noqa: B006
    sensitivity: SensitivityOption = False,
    data: DataOption = None,
    budget: BudgetOption = None,
    recipe_file: SuggestionOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what `convert` would make of every layer, what that gains and what methods cost, and change nothing."""
    with answering(json, quiet, debug) as give, progress_bar(json or quiet, _INSPECT_STAGES + sensitivity) as progress:
        measuring = Measuring.asked(
            sensitivity,
            data=data,
            budget=budget,
            output=recipe_file,
            overwrite=overwrite,
            shapes=bool(input),
            layers=bool(layer),
        )
        asked = _asked(
            RecipeFile(), method=method, pattern=pattern, set=set, skip=skip, include=include, layer=layer,
            keep_dense=keep_dense, block_axis=block_axis, preset=preset,
        )  # fmt: skip
        dense = read_dense(model, factory=factory, trust=trust)
        read, labels = measuring.read(dense.model) if measuring else (None, None)
        inputs = read or _inputs(input)
        found = nmgraph.inspect(dense.model, example_inputs=inputs, progress=progress, **asked.plan_arguments())
        values, shown, notes = found.to_dict() | {"notes": dense.notes}, Group(found), list(dense.notes)
        if not measuring:
            give(Answer(values, shown, str(found), "\n".join(notes)))
            return
        measured = measuring.run(dense.model, asked, inputs, labels, progress)
        if recipe_file:
            again = ["nmgraph", "convert", str(model), *_made_by(factory, trust), "--recipe", str(recipe_file)]
            notes.append(f"Wrote {recipe_file}. Convert with it: {typed(again)}")
        give(Answer(values | measured.values, Group(shown, *measured.shown), measured.brief, "\n".join(notes)))


@app.command(epilog=manual.CONVERT)
def convert(
    model: ModelArgument,
    method: MethodOption = None,
    pattern: PatternOption = None,
    recipe: RecipeOption = None,
    set: SetOption = [],  # noqa: B006
    skip: SkipOption = [],  # noqa: B006
    include: IncludeOption = [],  # noqa: B006
    layer: LayerOption = [],  # noqa: B006
    keep_dense: KeepDenseOption = None,
    block_axis: BlockAxisOption = None,
    preset: PresetOption = None,
    permute_channels: Annotated[
        bool, flag("--permute-channels", panel=SPARSITY, help="First order channels so that the masks keep more.")
    ] = False,
    factory: FactoryOption = None,
    trust: TrustOption = [],  # noqa: B006
    input: InputOption = [],  # noqa: B006
    output: OutOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a model's layers sparse-trainable, and write it beside the model as .nm.pt."""
    with (
        answering(json, quiet, debug) as give,
        progress_bar(json or quiet, _CONVERT_STAGES + permute_channels) as progress,
    ):
        out = output or default_output(model)
        require_writable(out, overwrite=overwrite)
        if out.exists() and model.exists() and out.samefile(model):
            raise FileError(f"{out} is the dense model itself, and is kept. Choose another place with -o.")
        asked = _asked(
            read_recipe(recipe) if recipe else RecipeFile(), method=method, pattern=pattern, set=set, skip=skip, include=include,
            layer=layer, keep_dense=keep_dense, block_axis=block_axis, preset=preset, permute_channels=permute_channels or None,
        )  # fmt: skip
        dense = read_dense(model, factory=factory, trust=trust)
        # Who wrote the recipe has looked at a run, and may name what no graph shows.
        inputs = _inputs(input) or (seeing.usual_inputs(dense.model) if recipe else None)
        converted = nmgraph.convert(dense.model, example_inputs=inputs, progress=progress, **asked.arguments())
        progress("saving")
        nmgraph.save(converted, out, factory=dense.factory)
        found = nmgraph.manifest(converted)
        named = dense.factory and not NamedModel.names(dense.factory)  # a library's own model is made again unasked
        again = ["nmgraph", "export", str(out), *_made_by(dense.factory if named else None, trust)]
        note = "\n".join([*dense.notes, f"Wrote {out}. Train it, then: {typed(again)}"])
        options = next(iter(masked_weights(converted).values())).told.method.options()
        settings: dict[str, Any] = {"options": options}
        if asked.preset:
            published = find_preset(asked.method, asked.preset)
            settings["preset"] = {"name": asked.preset, **dataclasses.asdict(published)}
            note = f"{_explain(asked, published, options)}\n{note}"
        shown = Group(found, PermutationReport(found.channel_order)) if asked.permute_channels else found
        give(Answer({"output": str(out), **settings, **found.to_dict(), "notes": dense.notes}, shown, str(out), note))


@app.command(epilog=manual.STATUS)
def status(
    converted: ConvertedArgument,
    factory: FactoryOption = None,
    trust: TrustOption = [],  # noqa: B006
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show where a converted model's training stands: steps, phase, every layer's mask, what is unfinished."""
    with answering(json, quiet, debug) as give, progress_bar(json or quiet, 1) as progress:
        model = nmgraph.load(converted, model=factory, trust=trust)
        progress("counting what is kept")
        found = standing_of(model)
        give(Answer(found.to_dict(), Group(escape(str(converted)), found), str(found)))


@app.command(epilog=manual.EXPORT)
def export(
    converted: ConvertedArgument,
    trt: Annotated[
        bool, flag("--trt", panel=TENSORRT, help="Build a TensorRT engine, and a dense one to compare.")
    ] = False,
    no_compare: Annotated[
        bool, flag("--no-compare", panel=TENSORRT, help="With --trt: build no dense engine.")
    ] = False,
    trt_command: Annotated[
        bool, flag("--trt-command", panel=TENSORRT, help="Print the trtexec line for another machine.")
    ] = False,
    project: Annotated[
        str | None,
        option("--project", panel=SPARSITY, metavar="2:4", help="Prune sparse layers further that are not 2:4."),
    ] = None,
    no_onnx: Annotated[bool, flag("--no-onnx", panel=OUTPUT, help="Write no ONNX file.")] = False,
    safetensors: Annotated[bool, flag("--safetensors", panel=OUTPUT, help="Write the weights, compressed.")] = False,
    hf: Annotated[bool, flag("--hf", panel=OUTPUT, help="Write a Hugging Face model's directory, hf/, too.")] = False,
    precision: Annotated[
        str,
        option(
            "--precision",
            panel=OUTPUT,
            metavar="DTYPE",
            help="Of the written weights: fp32, fp16 or bf16.",
            suggest=suggestions.precisions,
        ),
    ] = "fp32",
    dynamic_batch: Annotated[
        bool, flag("--dynamic-batch", panel=OUTPUT, help="Leave the batch size open in the ONNX file.")
    ] = False,
    fold_batchnorm: Annotated[
        bool, flag("--fold-batchnorm", panel=OUTPUT, help="Fold batch norms into convolutions.")
    ] = False,
    input: InputOption = [],  # noqa: B006
    factory: FactoryOption = None,
    trust: TrustOption = [],  # noqa: B006
    output: OutOption = None,
    overwrite: OverwriteOption = False,
    force: Annotated[
        bool, flag("--force", panel=SPARSITY, help="Prune what training has not finished, by what the method knows.")
    ] = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Finalize a trained model, write it, and prove what was written."""
    with (
        answering(json, quiet, debug) as give,
        progress_bar(json or quiet, _EXPORT_STAGES + _ENGINE_STAGES * trt) as progress,
    ):
        if trt:
            require_tensorrt()
        _require_no_directory(converted)
        out = output or _beside(converted, "-export")
        require_writable(out, overwrite=overwrite)
        model = nmgraph.load(converted, model=factory, trust=trust)
        report = nmgraph.export(
            model, out, example_inputs=_inputs(input), onnx=not no_onnx, trt=trt, compare=not no_compare,
            trt_command=trt_command, project=project, safetensors=safetensors, hf=hf, precision=precision,
            dynamic_batch=dynamic_batch, fold_batchnorm=fold_batchnorm, force=force,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
        note = f"To build the engine on another machine, in a copy of {out}:\n{report.trtexec}" if trt_command else ""
        give(Answer(report.to_dict(), report, str(out), note, FINE if report.holds else FAILED))


@app.command(epilog=manual.REPORT)
def report(
    converted: ConvertedArgument,
    log: Annotated[
        Path | None,
        option("--log", panel=MODEL, metavar="RUN.JSONL", help="The training log, as nmgraph.record writes it."),
    ] = None,
    export: Annotated[
        Path | None, option("--export", panel=MODEL, metavar="DIR", help="What `nmgraph export` wrote.")
    ] = None,
    factory: FactoryOption = None,
    trust: TrustOption = [],  # noqa: B006
    output: OutOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write one HTML file about a model: its layers, training and masks, and what is proved."""
    with answering(json, quiet, debug) as give, progress_bar(json or quiet, _REPORT_STAGES) as progress:
        _require_no_directory(converted)
        out = output or _beside(converted, "-report.html")
        require_writable(out, overwrite=overwrite)
        found = seeing.find_findings(converted, log, export, factory, trust)
        progress("drawing")
        seeing.write_report(found, out, overwrite=overwrite)
        values = {"output": str(out), **found.summary()}
        give(Answer(values, found.verdict[0], str(out), f"Wrote {out}. Open it in a browser."))


@app.command(epilog=manual.VERIFY)
def verify(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A .pt, .nm.pt, .safetensors or .onnx file, or a Hugging Face directory."),
    ],
    pattern: Annotated[
        str | None,
        option(
            "--pattern",
            panel=SPARSITY,
            metavar="N:M",
            help="Check against this pattern.",
            suggest=suggestions.patterns,
        ),
    ] = None,
    factory: FactoryOption = None,
    trust: TrustOption = [],  # noqa: B006
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check that weights keep to their pattern; exit code 1 if one does not."""
    with answering(json, quiet, debug) as give, progress_bar(json or quiet, 0) as progress:
        progress("checking weights")
        found = nmgraph.verify(file, pattern, model=factory, trust=trust)
        give(Answer(found.to_dict(), found, str(found), code=FINE if found.holds else FAILED))


@app.command(epilog=manual.BENCH)
def bench(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="ONNX files, or engines (.plan); the first is the baseline.")
    ],
    input: InputOption = [],  # noqa: B006
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Calls of each file that count.")] = 30,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time ONNX files in ONNX Runtime, or engines in TensorRT, on this machine, side by side."""
    with answering(json, quiet, debug) as give, progress_bar(json or quiet, len(files)) as progress:
        from nmgraph.export.timing import time_files

        found = time_files(files, inputs=_inputs(input), rounds=rounds, progress=progress)
        on_cpu = (
            "ONNX Runtime multiplies zeros like other numbers: sparse files are not faster here, only on NVIDIA GPUs."
        )
        note = on_cpu if found.runner.startswith("ONNX") else ""
        brief = "\n".join(f"{timing.median_ms:.2f} ms  {timing.file}" for timing in found.files)
        give(Answer(found.to_dict(), found, brief, note))


def _beside(converted: Path, ending: str) -> Path:
    return converted.with_name(f"{converted.name.removesuffix('.pt').removesuffix('.nm')}{ending}")


def _require_no_directory(path: Path) -> None:
    if path.is_dir():
        raise FileError(f"{path} is a directory; give a model's file.")


def _describe(cls: type[Any]) -> dict[str, Any]:
    keys = ("name", "title", "paper", "gradient", "state_cost", "time_cost")
    presets = {name: dataclasses.asdict(preset) for name, preset in cls.presets.items()}
    options = {f.name: f.default for f in dataclasses.fields(cls)}
    choices = {option: list(words) for option, words in cls.choices.items()}
    return {key: getattr(cls, key) for key in keys} | {"options": options, "choices": choices, "presets": presets}


def _shown(value: Any, choices: list[str] | None) -> str:
    """Write an option's default, and behind it the other words it may be."""
    if choices:
        return "|".join([value, *(word for word in choices if word != value)])
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


def _made_by(factory: str | None, trust: list[str]) -> list[str]:
    """Give the options with which a file is read again."""
    return [*(["--model", factory] if factory else []), *(word for package in trust for word in ("--trust", package))]


def _asked(
    told: RecipeFile,
    *,
    method: str | None,
    pattern: str | None,
    set: list[str],
    skip: list[str],
    include: list[str],
    layer: list[str],
    keep_dense: str | None,
    block_axis: str | None,
    preset: str | None,
    permute_channels: bool | None = None,
) -> RecipeFile:
    """Put the options of a command over a recipe."""
    given = {
        "method": method, "pattern": pattern, "preset": preset, "block_axis": block_axis, "keep_dense": _ends(keep_dense),
        "permute_channels": permute_channels,
    }  # fmt: skip
    layers = dict(_pair(text, "--layer", "GLOB=N:M") for text in layer)
    lists = {"options": _options(method or told.method, set), "skip": skip, "include": include, "layers": layers}
    return told.with_more({key: value for key, value in given.items() if value is not None} | lists)


def _explain(asked: RecipeFile, preset: Preset, options: dict[str, Any]) -> str:
    """Say what a preset stands for, and what was set otherwise beside it."""
    published = ", ".join(f"{key}={value}" for key, value in preset.options.items()) or "no options"
    dense = ", ".join(preset.keep_dense) or "none"
    changed = [f"{key}={options[key]}" for key, value in preset.options.items() if options[key] != value]
    changed += [] if asked.keep_dense is None else [f"layers kept dense: {','.join(asked.keep_dense) or 'none'}"]
    changed += [] if asked.block_axis is None else [f"blocks along: {asked.block_axis}"]
    return (
        f"Preset {asked.preset}: {published}; layers kept dense: {dense}; blocks along: {preset.block_axis}.\n"
        + (f"Set otherwise here: {'; '.join(changed)}.\n" if changed else "")
        + f"Its training, which your loop sets: {preset.training}."
    )


def _ends(text: str | None) -> list[str] | None:
    """Read ``stem,head``; an empty text is none of them, and not the same as nothing."""
    return None if text is None else [end.strip() for end in text.split(",") if end.strip()]


def _options(method: str, texts: list[str]) -> dict[str, Any]:
    """Read ``key=value`` texts by the types of the method's options; whether they exist, the method says itself."""
    options: dict[str, Any] = {}
    types: dict[str, Any] = (
        {f.name: type(f.default) for f in dataclasses.fields(METHODS[method])} if method in METHODS else {}
    )
    for key, value in (_pair(text, "--set", "KEY=VALUE") for text in texts):
        kind = types.get(key, str)
        try:
            options[key] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError) as error:
            raise MethodError(f"--set {key}={value}: {value!r} is no {kind.__name__}.") from error
    return options


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ConversionError(f"{option} {text!r} has another form than {form}.")
    return key, value


def _inputs(texts: list[str]) -> Any:
    if not texts:
        return None
    from nmgraph.export.inputs import parse_inputs

    return parse_inputs(texts)
