"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A pickled module, a Hugging Face directory, timm:NAME, torchvision:NAME, or weights with --model.",
    ),
]
ConvertedArgument = Annotated[
    Path, typer.Argument(metavar="CONVERTED", help="A .nm.pt file, as `nmgraph convert` writes it.")
]
FactoryOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PKG.MOD:FACTORY",
        help="What makes the dense model; also timm:NAME or torchvision:NAME, with ,KEY=VALUE for options.",
    ),
]
TrustOption = Annotated[
    list[str], typer.Option("--trust", metavar="PACKAGE", help="Import this package if the file names its classes.")
]
MethodOption = Annotated[str, typer.Option("--method", help="Training method; see `nmgraph methods`.")]
PatternOption = Annotated[
    str, typer.Option("--pattern", metavar="N:M", help="Keep N of every M weights along the input channels.")
]
RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="Take all this from a recipe; what is given beside it counts more."),
]
SensitivityOption = Annotated[
    bool, typer.Option("--sensitivity", help="Prune each layer alone, and measure how much worse the model answers.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Of --sensitivity: tensors by argument name, and labels; .pt, .safetensors, .npz.",
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", metavar="flops=0.5|size=0.5", help="Of --sensitivity: suggest a pattern for each layer."),
]
SuggestionOption = Annotated[
    Path | None, typer.Option("--recipe", metavar="OUT.json", help="Of --budget: write it, for convert --recipe.")
]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set an option of the method.")]
SkipOption = Annotated[list[str], typer.Option("--skip", metavar="GLOB", help="Leave these layers dense.")]
IncludeOption = Annotated[
    list[str],
    typer.Option("--include", metavar="GLOB", help="Convert these, too, if grouped, frozen or shared."),
]
LayerOption = Annotated[
    list[str],
    typer.Option(
        "--layer", metavar="GLOB=N:M", help="Give these layers a pattern of their own; the last that matches counts."
    ),
]
KeepDenseOption = Annotated[
    str | None, typer.Option("--keep-dense", metavar="stem,head", help="Leave the layers at the model's ends dense.")
]
BlockAxisOption = Annotated[
    str | None,
    typer.Option("--block-axis", metavar="channels|flat", help="Along what blocks of a convolution run."),
]
PresetOption = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help="Published settings of the method: paper, code.")
]
InputOption = Annotated[
    list[str], typer.Option("--input", metavar="[NAME=]1x3x224x224[:DTYPE]", help="Shape of an example input.")
]
OutOption = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
