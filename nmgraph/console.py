"""What a command prints: results to stdout, everything else to stderr; and how it ends."""

from __future__ import annotations

import json as json_module
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from nmgraph.errors import NMGraphError

FINE, FAILED, MISUSED = 0, 1, 2


def answer(json: bool, values: Any, shown: Any, note: str = "", code: int = FINE) -> None:
    """Print a result, as JSON or as a person reads it, and end with an exit code."""
    if json:
        sys.stdout.write(json_module.dumps(values, indent=2) + "\n")
    else:
        console = Console()
        console.print(shown)
        if note:
            console.print(note, markup=False, soft_wrap=True)
    if code:
        raise typer.Exit(code)


@contextmanager
def answering(json: bool, debug: bool) -> Iterator[None]:
    """Turn an error into a message on stderr, or into JSON, and an exit code."""
    try:
        yield
    except NMGraphError as error:
        _complain(json, debug, str(error))
    except KeyboardInterrupt:
        _complain(json, debug, "interrupted; nothing was written.")
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        _complain(
            json, debug, f"internal error: {type(error).__name__}: {error}\nPlease report it, with what --debug shows."
        )


def _complain(json: bool, debug: bool, message: str) -> None:
    if debug:
        traceback.print_exc()
    if json:
        sys.stdout.write(json_module.dumps({"error": message}) + "\n")
    else:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(MISUSED)


@contextmanager
def progress_bar(json: bool, stages: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr while a person waits; none where nobody watches."""
    console = Console(file=sys.stderr)  # kept: the exporter's own output to stderr is silenced meanwhile
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=json or not console.is_terminal) as bar:
        task = bar.add_task("reading", total=stages + 1)
        begun = ""

        def advance(stage: str) -> None:
            nonlocal begun
            before, begun = begun, stage.partition(":")[0]  # what follows tells how far the same stage is
            bar.update(task, description=stage, advance=begun != before)

        yield advance
