"""The zoo's results as a page."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

Result = dict[str, Any]

TITLES = {
    "torchvision": "torchvision: all of its models",
    "timm": "timm: the smallest model of each family",
    "transformers": "Hugging Face: tiny configurations",
}
INTRODUCTION = """\
# The zoo: which models convert, and do they behave as they did?

Written by `benchmarks/zoo.py` from `benchmarks/results/zoo.json`; do not edit it by hand.

    python benchmarks/zoo.py --json benchmarks/results/zoo.json --page docs/zoo.md

Every model has random weights, and none is downloaded. Parameters that start as constants are spread a little first: a
branch that is multiplied by zero would hide what happens in it. Of every model is asked, in code that is not nmgraph's:

- **sites**: what was converted, of all entries of the manifest. The manifest is held to the operators that really
  run, in evaluation and in training: each parameter that reaches a matrix product or a convolution, as it is or through
  views, casts, copies or other functions, must have exactly one entry, with its own shape, and be converted along the axis
  that is summed over. Tables that are only gathered from (relative positions) may be left out.
- **FLOPs**: share of the prunable floating-point operations whose weight was converted. Prunable is what multiplies
  by a weight whose reduction axis is a multiple of 4, in no grouped or depthwise convolution; it is counted whether or
  not nmgraph calls it a site. The reasons of the rest stand [below](#what-stays-dense). **prunable**: their share of the
  operations of all weights.
- **as before**: classes, `state_dict` keys, and the names, order, types and identity of parameters are those of the dense model.
- **faithful**: the finalized weights, loaded strictly into a fresh model, give what the converted model gives: in
  evaluation and training, under the same seed, and again after switching modes. *bits* is bit-equal, a number the largest
  difference relative to the largest output.
- **trains**: converted weights that changed in one step of SGD / those with a gradient other than zero.
- **2:4**: after that step and `finalize`, every block of every converted weight keeps at most 2 of 4.
- **fx**: whether plain `torch.fx.symbolic_trace` manages the model.
- **ModelOpt**: share of the same prunable operations that NVIDIA ModelOpt's `sparse_magnitude` makes 2:4. It takes
  Linear and Conv2d layers whose output and input sizes are multiples of 8 and 16, and by default no language model's head.

A model too large to run here was tried on the `meta` device, where there are shapes and no values: it converts, and the
manifest is held to the operators, but *faithful*, *trains* and *2:4* are not asked.
torchvision's quantized models are left out: their weights are integers, and N:M comes before quantization.
"""


def failures(result: Result) -> list[str]:
    """List what did not hold of one model."""
    if result.get("error"):
        return [result["error"]]
    found = [f"{name}: {c['problems'][0]}" for name, c in result.get("checks", {}).items() if not c["holds"]]
    found += [f"does not run in {mode}: {said}" for mode, said in result.get("runs", {}).items()]
    onnx = result.get("onnx", {})
    if onnx.get("problem") or onnx.get("holds") is False:
        found.append(f"onnx: {onnx.get('problem') or 'the proof or the comparison failed'}")
    return found


def page(recorded: dict[str, Any]) -> str:
    """Write the whole page."""
    results: list[Result] = recorded["results"]
    parts = [INTRODUCTION, made_with(recorded), *summary(results)]
    for library, title in TITLES.items():
        of_library = [r for r in results if r["model"].startswith(f"{library}/")]
        if of_library:
            parts += [f"## {title}\n", table(of_library)]
    return "\n".join([*parts, *dense(results), *beside(results), *onnx(results)]).rstrip() + "\n"


def made_with(recorded: dict[str, Any]) -> str:
    versions = {**recorded["versions"], **recorded["libraries"]}
    commits = {r["commit"][:10] + r["commit"][40:] for r in recorded["results"] if r.get("commit")}
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "nmgraph")
    return f"Pattern {recorded['pattern']}, method {recorded['method']}; {named}; nmgraph at {', '.join(sorted(commits))}.\n"


def summary(results: list[Result]) -> Iterator[str]:
    yield "## In short\n"
    yield "| | models | converts | manifest covers | as before | faithful | of these bit-equal | trains | 2:4 | FLOPs: mean | all FLOPs | plain fx traces |"
    yield "|---|" + "---|" * 11
    for library in [*TITLES, "all"]:
        chosen = [r for r in results if library in ("all", r["model"].partition("/")[0])]
        if chosen:
            yield "| " + " | ".join([library, *counted(chosen)]) + " |"
    yield ""
    broken = [(r["model"], failures(r)) for r in results if failures(r)]
    yield f"### What does not hold: {len(broken)} models\n" if broken else "Every check of every model holds.\n"
    for model, problems in broken:
        yield f"- `{model}`: {'; '.join(cell(p) for p in problems)}"
    if broken:
        yield ""


def counted(results: list[Result]) -> list[str]:
    def holds(check: str) -> str:
        asked = [r["checks"][check]["holds"] for r in results if check in r.get("checks", {})]
        return f"{sum(asked)} of {len(asked)}"

    faithful = [r["checks"]["faithful"] for r in results if "faithful" in r.get("checks", {})]
    shares = [r["converted_share"] for r in results if r.get("converted_share") is not None]
    traced = [not r["symbolic_trace"] for r in results if "symbolic_trace" in r]
    return [
        str(len(results)),
        *(holds(check) for check in ("convert", "manifest", "structure", "faithful")),
        str(sum(bool(f.get("bit_equal")) for f in faithful)),
        *(holds(check) for check in ("training", "pattern")),
        percent(statistics.mean(shares)) if shares else "-",
        f"{sum(share > 1 - 1e-9 for share in shares)} of {len(shares)}",
        f"{sum(traced)} of {len(traced)}",
    ]


def table(results: list[Result]) -> str:
    lines = [
        "| model | parameters | sites | prunable | FLOPs | manifest | as before | faithful | trains | 2:4 | fx | ModelOpt |",
        "|---|" + "---:|" * 4 + "---|" * 6 + "---:|",
    ]
    lines += ["| " + " | ".join(row(r)) + " |" for r in results]
    return "\n".join(lines) + "\n"


def row(r: Result) -> list[str]:
    name = r["model"].partition("/")[2]
    if r.get("error") or not r.get("checks", {}).get("convert", {}).get("holds"):
        return [name, millions(r.get("parameters")), "**no**", *["-"] * 9]
    checks = r["checks"]
    training, faithful = checks.get("training", {}), checks.get("faithful", {})
    changed = (
        f"{training['changed']} / {training['changed'] + sum('did not change' in p for p in training.get('problems', []))}"
        if "changed" in training
        else ""
    )
    worst = faithful.get("worst")
    exact = "bits" if faithful.get("bit_equal") else f"{worst:.0e}" if isinstance(worst, float) else ""
    theirs = r.get("modelopt") or {}
    return [
        name + (" (meta)" if r["light"] else ""),
        millions(r["parameters"]),
        f"{r['converted']} of {r['sites']}",
        percent(r.get("prunable_share")),
        percent(r.get("converted_share")),
        verdict(checks.get("manifest")),
        verdict(checks.get("structure")),
        verdict(faithful, exact),
        verdict(training, changed),
        verdict(checks.get("pattern")),
        "yes" if r.get("symbolic_trace") == "" else "no",
        "fails" if "error" in theirs else percent(theirs.get("share_of_prunable_flops")),
    ]  # fmt: skip


def verdict(check: dict[str, Any] | None, shown: str = "") -> str:
    if not check:
        return "-"
    return (shown or "yes") if check["holds"] else "**no**"


def percent(share: float | None) -> str:
    if share is None:
        return "-"
    return "100%" if share > 1 - 1e-9 else f"{min(share, 0.999):.1%}"


def millions(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def dense(results: list[Result]) -> Iterator[str]:
    """List the prunable weights that stay dense, by reason."""
    by_cause: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for r in results:
        for exception in r.get("exceptions", ()):
            by_cause[exception["cause"]].append((r["model"], exception))
    if not by_cause:
        return
    yield "## What stays dense\n"
    yield "Prunable weights that were not converted, by the manifest's reason (numbers as #); of each model the share of its prunable FLOPs.\n"
    for cause, found in sorted(by_cause.items(), key=lambda item: -len(item[1])):
        yield f"- **{cell(cause)}** ({len(found)} models): " + "; ".join(
            f"`{model}` {percent(e['share'])} ({e['weights']}, such as `{e['such_as'][0]}`)" for model, e in found
        )
    yield ""


def beside(results: list[Result]) -> Iterator[str]:
    """Say what ModelOpt made of the models."""
    tried = [r for r in results if r.get("modelopt")]
    if not tried:
        return
    yield "## ModelOpt beside it\n"
    ran = [r for r in tried if "error" not in r["modelopt"] and r["modelopt"]["share_of_prunable_flops"] is not None]
    both = [r for r in ran if r.get("converted_share") is not None]
    ours, theirs = ([r["converted_share"] for r in both], [r["modelopt"]["share_of_prunable_flops"] for r in both])
    more = sum(a > b + 1e-9 for a, b in zip(ours, theirs, strict=True))
    less = sum(a < b - 1e-9 for a, b in zip(ours, theirs, strict=True))
    yield (
        f"Tried on {len(tried)} models, it ran on {len(ran)}. Of prunable operations it makes {statistics.mean(theirs):.1%} 2:4 on "
        f"average, nmgraph {statistics.mean(ours):.1%}; nmgraph converts more in {more} models, less in {less}.\n"
    )
    for r in tried:
        if "error" in r["modelopt"]:
            yield f"- `{r['model']}`: fails with {cell(r['modelopt']['error'])}"
    strange = [r for r in tried if r["modelopt"].get("questionable")]
    if strange:
        yield f"Of {len(strange)} models it pruned weights that sparse tensor cores don't take, or that take part in nothing:\n"
    for r in strange:
        first, *others = r["modelopt"]["questionable"]
        unlisted = int(others.pop().split()[1]) if others and re.fullmatch(r"and \d+ more", others[-1]) else 0
        more = f", and {len(others) + unlisted} more" if others else ""
        yield f"- `{r['model']}`: {cell(first)}{more}"
    yield ""


def onnx(results: list[Result]) -> Iterator[str]:
    """Say which models went through ONNX."""
    tried = [r for r in results if "onnx" in r]
    if not tried:
        return
    able = [r for r in tried if r["onnx"].get("dense") == ""]
    held = [r for r in able if r["onnx"].get("holds")]
    yield "## Through ONNX\n"
    yield (
        f"Of {len(tried)} models tried, torch exports {len(able)} when they are dense; of these {len(held)} export finalized, "
        "with N:M proved on the file and ONNX Runtime's answers agreeing.\n"
    )
    yield "| model | proved weights | largest relative error | |"
    yield "|---|---:|---:|---|"
    for r in tried:
        o = r["onnx"]
        if o.get("dense"):
            yield f"| {r['model']} | - | - | dense: {cell(o['dense'])} |"
        elif "holds" in o:
            yield f"| {r['model']} | {o['proved']} | {o['relative_error']:.0e} | {'holds' if o['holds'] else '**fails**'} |"
        else:
            yield f"| {r['model']} | - | - | **{cell(o.get('problem') or 'failed')}** |"
    yield ""


def cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
