"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nmgraph import suggestions

MODEL, SPARSITY, SENSITIVITY = "Model", "Sparsity", "Sensitivity"
OUTPUT, TENSORRT, PRINTING = "Output", "TensorRT", "Printing"
"""The panels of --help."""


def flag(*names: str, panel: str, help: str) -> Any:
    """Make an option that takes no value."""
    return typer.Option(*names, metavar="", rich_help_panel=panel, help=help)


def option(*names: str, panel: str, metavar: str, help: str, suggest: Any = None) -> Any:
    """Make an option that takes a value, with what a shell may complete it to."""
    return typer.Option(*names, metavar=metavar, rich_help_panel=panel, help=help, autocompletion=suggest)


ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A pickled module, a Hugging Face directory, timm:NAME, torchvision:NAME, or weights with --model.",
        autocompletion=suggestions.models,
    ),
]
ConvertedArgument = Annotated[
    Path, typer.Argument(metavar="CONVERTED", help="A .nm.pt file, as `nmgraph convert` writes it.")
]
FactoryOption = Annotated[
    str | None,
    option(
        "--model",
        panel=MODEL,
        metavar="MAKER",
        help="What makes the dense model: package.module:function, timm:NAME or torchvision:NAME, with ,KEY=VALUE "
        "for options.",
        suggest=suggestions.models,
    ),
]
TrustOption = Annotated[
    list[str],
    option("--trust", panel=MODEL, metavar="PACKAGE", help="Import this package if the file names its classes."),
]
MethodOption = Annotated[
    str | None,
    option(
        "--method",
        panel=SPARSITY,
        metavar="NAME",
        help="Training method, lbc if none is given; see `nmgraph methods`.",
        suggest=suggestions.methods,
    ),
]
PatternOption = Annotated[
    str | None,
    option(
        "--pattern",
        panel=SPARSITY,
        metavar="N:M",
        help="Keep N of every M weights along the input channels; 2:4 if none is given.",
        suggest=suggestions.patterns,
    ),
]
RecipeOption = Annotated[
    Path | None,
    option(
        "--recipe",
        panel=SPARSITY,
        metavar="FILE",
        help="Take all this from a recipe; what is given beside it counts more.",
    ),
]
SensitivityOption = Annotated[
    bool,
    flag(
        "--sensitivity", panel=SENSITIVITY, help="Prune each layer alone, and measure how much worse the model answers."
    ),
]
DataOption = Annotated[
    Path | None,
    option(
        "--data",
        panel=SENSITIVITY,
        metavar="FILE",
        help="Tensors by argument name, and labels, to measure on: .pt, .safetensors or .npz.",
    ),
]
BudgetOption = Annotated[
    str | None,
    option(
        "--budget",
        panel=SENSITIVITY,
        metavar="KIND=SHARE",
        help="Suggest a pattern for each layer: flops=0.5 for half of the operations, size=0.5 for half of the bytes.",
    ),
]
SuggestionOption = Annotated[
    Path | None,
    option(
        "--recipe", panel=SENSITIVITY, metavar="OUT.json", help="Write what --budget suggests, for convert --recipe."
    ),
]
SetOption = Annotated[
    list[str],
    option(
        "--set",
        panel=SPARSITY,
        metavar="KEY=VALUE",
        help="Set an option of the method.",
        suggest=suggestions.settings,
    ),
]
SkipOption = Annotated[list[str], option("--skip", panel=SPARSITY, metavar="GLOB", help="Leave these layers dense.")]
IncludeOption = Annotated[
    list[str],
    option("--include", panel=SPARSITY, metavar="GLOB", help="Convert these, too, if grouped, frozen or shared."),
]
LayerOption = Annotated[
    list[str],
    option(
        "--layer",
        panel=SPARSITY,
        metavar="GLOB=N:M",
        help="Give these layers a pattern of their own; the last that matches counts.",
    ),
]
KeepDenseOption = Annotated[
    str | None,
    option(
        "--keep-dense",
        panel=SPARSITY,
        metavar="stem,head",
        help="Leave the layers at the model's ends dense.",
        suggest=suggestions.ends,
    ),
]
BlockAxisOption = Annotated[
    str | None,
    option(
        "--block-axis",
        panel=SPARSITY,
        metavar="AXIS",
        help="Along what blocks of a convolution run: channels or flat.",
        suggest=suggestions.axes,
    ),
]
PresetOption = Annotated[
    str | None,
    option(
        "--preset",
        panel=SPARSITY,
        metavar="NAME",
        help="Published settings of the method: paper, code.",
        suggest=suggestions.presets,
    ),
]
InputOption = Annotated[
    list[str],
    option(
        "--input",
        panel=MODEL,
        metavar="SHAPE",
        help=r"Shape of an example input: 1x3x224x224, or \[NAME=]SHAPE\[:DTYPE].",
    ),
]
OutOption = Annotated[Path | None, option("-o", "--output", panel=OUTPUT, metavar="PATH", help="Where to write.")]
OverwriteOption = Annotated[bool, flag("--overwrite", panel=OUTPUT, help="Replace an earlier output.")]
QuietOption = Annotated[bool, flag("-q", "--quiet", panel=PRINTING, help="Print only what a script needs; see below.")]
JsonOption = Annotated[bool, flag("--json", panel=PRINTING, help="Print JSON, errors too.")]
DebugOption = Annotated[bool, flag("--debug", panel=PRINTING, help="Show the traceback of an error.")]
