"""The command line, called in this process."""

import json

from typer.testing import CliRunner

from nmgraph.cli import app


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


def answer(*arguments, code=0):
    """Call with --json, and give what stdout holds."""
    result = call(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (code, ""), result.output
    return json.loads(result.stdout)
