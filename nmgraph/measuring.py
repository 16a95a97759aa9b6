"""What `nmgraph inspect --sensitivity` does: reads data, measures, suggests, writes the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from torch import Tensor, nn

from nmgraph.accounting.budget import Budget, suggest
from nmgraph.checkpoint.data_file import read_data
from nmgraph.errors import ConversionError, FileError
from nmgraph.export.inputs import Inputs, find_inputs, named_inputs
from nmgraph.files import require_writable
from nmgraph.methods import find_preset, make_method
from nmgraph.passes.recipe_file import RecipeFile
from nmgraph.passes.sensitivity import USUAL_PATTERNS
from nmgraph.seeing import sensitivity as measure_sensitivity


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        values: plain ones.
        shown: what a person reads.
        brief: one line: the recipe's path, the suggestion, or what was measured.
    """

    values: dict[str, Any]
    shown: list[RenderableType]
    brief: str


@dataclass(frozen=True)
class Measuring:
    """What was asked for.

    Attributes:
        data: file of the tensors to run on; without it they are made up.
        budget: to suggest patterns for, if any.
        output: where the recipe of the suggestion goes, if anywhere.
    """

    data: Path | None = None
    budget: Budget | None = None
    output: Path | None = None

    @classmethod
    def asked(
        cls,
        sensitivity: bool,
        *,
        data: Path | None,
        budget: str | None,
        output: Path | None,
        overwrite: bool,
        shapes: bool,
        layers: bool,
    ) -> Measuring | None:
        """Check the options before any work is done; None without ``--sensitivity``.

        Raises:
            ConversionError: for an option without the one it belongs to.
            FileError: if the recipe could not be written.
        """
        for option, given, needed, there in (
            ("--data", data, "--sensitivity", sensitivity),
            ("--budget", budget, "--sensitivity", sensitivity),
            ("--recipe", output, "--budget", budget),
            ("--overwrite", overwrite, "--recipe", output),
        ):
            if given and not there:
                raise ConversionError(f"{option} does nothing without {needed}. Add {needed}, or leave {option} away.")
        if data and shapes:
            raise ConversionError("--data holds the inputs already. Leave --input away.")
        if budget and layers:
            raise ConversionError(
                "--budget suggests the pattern of each layer. Leave --layer away, or --skip those layers."
            )
        if output:
            if output.is_dir():
                raise FileError(f"{output} is a directory. Give the name of a file in it.")
            require_writable(output, overwrite=overwrite, option="--recipe")
        return cls(data, Budget.parse(budget) if budget else None, output) if sensitivity else None

    def read(self, model: nn.Module) -> tuple[Inputs | None, Tensor | None]:
        """Read inputs of the model, and labels, from the file; None of what there is not."""
        if self.data is None:
            return None, None
        tensors = read_data(self.data)
        labels = tensors.pop("labels", None)
        return named_inputs(model, tensors), labels

    def run(
        self,
        model: nn.Module,
        asked: RecipeFile,
        inputs: Inputs | None,
        labels: Tensor | None,
        progress: Callable[[str], None],
    ) -> Measured:
        """Measure.

        Args:
            model: dense.
            asked: what else was said: method, pattern, what stays dense.
            inputs: to run on; by default the usual ones, made up.
            labels: of them.
            progress: called with what begins.
        """
        patterns = dict.fromkeys([asked.pattern, *USUAL_PATTERNS])
        preset = find_preset(asked.method, asked.preset) if asked.preset else None
        ends: dict[str, Any] = {
            "keep_dense": list(preset.keep_dense) if preset and asked.keep_dense is None else asked.keep_dense,
            "block_axis": preset.block_axis if preset and asked.block_axis is None else asked.block_axis,
        }
        found = measure_sensitivity(
            model,
            inputs or find_inputs(model, None),
            labels=labels,
            patterns=list(patterns),
            method=make_method(asked.method, {**(preset.options if preset else {}), **asked.options}),
            skip=asked.skip,
            include=asked.include,
            progress=progress,
            **ends,
        )
        if self.budget is None:
            return Measured({"sensitivity": found.to_dict()}, [found], str(found))
        suggestion = suggest(found, self.budget)
        brief = str(suggestion)
        if self.output:
            own = {
                "method": asked.method,
                "pattern": asked.pattern,
                "options": asked.options,
                "preset": asked.preset,
                **ends,
            }
            suggested = suggestion.recipe(**own).with_more({"skip": asked.skip, "include": asked.include})
            suggested.write(self.output, overwrite=True)
            brief = str(self.output)
        values = {"sensitivity": found.to_dict(), "suggestion": suggestion.to_dict()}
        return Measured(values, [found, suggestion], brief)
