"""The zoo's results as a page."""

from __future__ import annotations

from typing import Any


def failures(result: dict[str, Any]) -> list[str]:
    """List what did not hold of one model."""
    if result.get("error"):
        return [result["error"]]
    found = [f"{name}: {c['problems'][0]}" for name, c in result.get("checks", {}).items() if not c["holds"]]
    onnx = result.get("onnx", {})
    if onnx.get("problem") or onnx.get("holds") is False:
        found.append(f"onnx: {onnx.get('problem') or 'the proof or the comparison failed'}")
    return found


def page(recorded: dict[str, Any]) -> str:
    return ""
