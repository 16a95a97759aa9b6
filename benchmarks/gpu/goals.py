"""The goals for sparse tensor cores, each beside the figure that was seen."""

from collections.abc import Iterator
from typing import Any

import gemms
import steps

MLP = {"t-mask": 1.30, "bi-mask": 1.20}  # ViT-L's, forward and backward
LLAMA = 1.20  # times faster, a whole step
SHARE = 0.05  # of a step, at most
LEAST = 0.98  # of the dense speed, whatever is chosen


def lines(sections: dict[str, Any]) -> list[str]:
    """Say of each goal what was seen."""
    found = {name: section.get("results", {}) for name, section in sections.items()}
    stepped = found.get("steps", {})
    said = []
    for variant, goal in MLP.items():
        added = gemms.pair_speedup(found.get("gemms", {}), variant.replace("-", "_"), "speedup")
        said.append(_line(f"ViT-L MLP, {variant}, products added up, >= {goal:.2f}x", added, goal))
        for kind in ("eager", "compiled"):
            seen = stepped.get(f"vit_l_mlp {kind}", {}).get(variant, {}).get("forward_backward_speedup")
            said.append(_line(f"ViT-L MLP, {variant}, forward and backward, {kind}, >= {goal:.2f}x", seen, goal))
    for variant in steps.SPARSE:
        for kind in ("eager", "compiled"):
            seen = stepped.get(f"llama {kind}", {}).get(variant, {}).get("step_speedup")
            said.append(_line(f"Llama-like step, {variant}, {kind}, >= {LLAMA:.2f}x", seen, LLAMA))
    for piece, result in found.get("share", {}).items() or [("any model", {})]:
        seen = result.get("share")
        said.append(_line(f"masks and compression of {piece}, < {SHARE:.0%} of a step", seen, SHARE, most=True))
    slowest = min(_auto(stepped), default=(None, ""))
    said.append(_line(f"nothing chosen is under {LEAST}x of dense{slowest[1]}", slowest[0], LEAST))
    return said


def _auto(stepped: dict[str, Any]) -> Iterator[tuple[float, str]]:
    for piece, result in stepped.items():
        for variant in steps.SPARSE:
            if variant in result:
                yield result[variant]["step_speedup"], f" (slowest: {piece}, {variant})"


def _line(goal: str, seen: float | None, wanted: float, *, most: bool = False) -> str:
    if seen is None:
        return f"not measured   {goal}"
    met = seen < wanted if most else seen >= wanted
    figure = f"{seen:.1%}" if most else f"{seen:.2f}x"
    return f"{'met' if met else 'missed':<14} {goal}: {figure}"
