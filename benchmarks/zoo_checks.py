"""What the zoo asks of one model. Every check is written without nmgraph's own code, except for what it checks."""

from __future__ import annotations

import copy
import functools
import math
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Arguments, Entry, seed
from zoo_products import Use, watch

import nmgraph

N, M = 2, 4
TOLERANCE = 1e-5  # of the largest output
METHOD = "srste"
SAMPLE_METHODS = ("lbc", "bimask")

# What a parameter is to a product only after it was gathered from, like a table of relative positions, is no layer's
# weight; all else that reaches a product has to be in the manifest.
WEIGHT_LIKE = ("as it is", "moved", "selected", "computed")


class Findings:
    """Outcomes of checks by name, each with what was found."""

    def __init__(self) -> None:
        self.checks: dict[str, dict[str, Any]] = {}

    def say(self, name: str, problems: list[str], **facts: Any) -> None:
        """Note a check: it holds if there are no problems."""
        self.checks[name] = {"holds": not problems, **facts} | ({"problems": shortened(problems)} if problems else {})

    def attempt(self, name: str, check: Callable[[], None]) -> bool:
        """Run a check; an exception is a problem of it."""
        try:
            check()
        except Exception as error:
            self.say(name, [f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"])
        return self.checks.get(name, {}).get("holds", False)


def shortened(problems: list[str]) -> list[str]:
    return problems if len(problems) <= 12 else [*problems[:12], f"and {len(problems) - 12} more"]


def measure(entry: Entry, methods: tuple[str, ...] = (METHOD,), beside: bool = True) -> dict[str, Any]:
    """Make all checks of one model.

    Args:
        entry: the model.
        methods: the first is the one the table speaks of.
        beside: also try ``torch.fx.symbolic_trace``, and ModelOpt where it is installed.
    """
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"model": entry.name, "light": entry.light}
    found = Findings()
    result["checks"] = found.checks
    dense = built(entry)
    result["class"] = f"{type(dense).__module__}.{type(dense).__qualname__}"
    result["parameters"] = sum(p.numel() for p in dense.parameters())
    uses, attended, failed = products(entry, dense)
    if failed:
        result["runs"] = failed
    if found.attempt("convert", lambda: convert(found, result, dense, uses, attended)) and not entry.light:
        for method in methods:
            prefix = "" if method == METHOD else f"{method}: "
            found.attempt(f"{prefix}training", lambda m=method, p=prefix: check_training(found, p, entry, m))
        found.attempt("faithful", lambda: check_faithful(found, "", entry))
    if beside:
        result["symbolic_trace"] = symbolic_trace(entry)
        if not entry.light:
            result["modelopt"] = modelopt(entry, uses)
    return result


def convert(
    found: Findings, result: dict[str, Any], dense: nn.Module, uses: dict[str, Use], attended: set[str]
) -> None:
    """Convert the model, and make the checks that need no values."""
    before = Shape(dense)
    converted = nmgraph.convert(dense, method=METHOD, pattern=f"{N}:{M}")
    found.say("convert", [])
    manifest = nmgraph.manifest(converted)
    result["sites"], result["converted"] = len(manifest.entries), len(manifest.converted)
    found.attempt("structure", lambda: found.say("structure", before.differences(converted)))
    found.attempt("manifest", lambda: check_manifest(found, manifest, converted, uses, attended))
    found.attempt("flops", lambda: result.update(flops(manifest, converted, uses, found)))


def built(entry: Entry) -> nn.Module:
    """Give a new copy of the model; one whose values do not matter on the meta device."""
    return copy.deepcopy(_first(entry))


@functools.lru_cache(maxsize=1)
def _first(entry: Entry) -> nn.Module:
    return fresh(entry)


def fresh(entry: Entry) -> nn.Module:
    """Build the model, which takes longer than a copy where many weights are drawn."""
    seed()
    if entry.light:
        try:
            with torch.device("meta"):
                return entry.build()
        except NotImplementedError:  # its constructor reads values of tensors, as RegNet's does
            return entry.build().to("meta")
    model = entry.build()
    enliven(model)
    return model


def enliven(model: nn.Module) -> None:
    """Spread parameters that start as constants: a branch that is multiplied by zero would hide what happens in it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)


def call(model: nn.Module, arguments: Arguments) -> Any:
    return model(**arguments) if isinstance(arguments, dict) else model(*arguments)


def arguments_of(entry: Entry, training: bool) -> Arguments:
    seed()
    if entry.light:
        with torch.device("meta"):
            return entry.inputs(training)
    return entry.inputs(training)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """List the tensors of an output, whatever holds them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def products(entry: Entry, dense: nn.Module) -> tuple[dict[str, Use], set[str], dict[str, str]]:
    """Find which parameters are multiplied by in evaluation and in training; operations count one evaluation."""
    uses: dict[str, Use] = {}
    attended: set[str] = set()
    failed = {}
    watched = copy.deepcopy(dense)
    for training in (False, True):
        watched.train(training)
        arguments = arguments_of(entry, training)
        try:
            products = watch(watched, lambda arguments=arguments: call(watched, arguments))
        except Exception as error:
            failed["training" if training else "evaluation"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        uses = {**products.uses, **uses}
        attended |= products.attended
    return uses, attended, failed


class Shape:
    """Classes, keys and parameters of a model before it is converted."""

    def __init__(self, model: nn.Module) -> None:
        self.classes = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
        self.keys = list(model.state_dict())
        self.parameters = self._parameters(model)

    @staticmethod
    def _parameters(model: nn.Module) -> list[tuple[Any, ...]]:
        parameters = model.named_parameters(remove_duplicate=False)
        return [(name, id(p), p.requires_grad, p.dtype, tuple(p.shape), type(p)) for name, p in parameters]

    def differences(self, model: nn.Module) -> list[str]:
        """Say what is no longer as it was."""
        problems = []
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, kind in self.classes.items():
            if name not in modules:
                problems.append(f"module {name or '(root)'} is gone")
            elif not isinstance(modules[name], kind):
                problems.append(f"{name or '(root)'} was a {kind.__name__}, now a {type(modules[name]).__name__}")
        keys = [key for key in model.state_dict() if not key.rpartition(".")[2].startswith("nm_")]
        if keys != self.keys:
            changed = sorted(set(keys) ^ set(self.keys))
            problems.append(
                f"state_dict keys differ: {changed[:4]}" if changed else "state_dict keys are in another order"
            )
        now = self._parameters(model)
        if now != self.parameters:
            changed = [str(a[0]) for a, b in zip(self.parameters, now, strict=False) if a != b]
            problems.append(f"parameters differ: {changed[:4] or 'their number'}")
        return problems


def sites_by_parameter(manifest: Any, model: nn.Module) -> tuple[dict[int, list[Any]], list[str]]:
    """Find the parameter that each entry of the manifest speaks of; and the entries that speak of none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sites: dict[int, list[Any]] = defaultdict(list)
    nothing = []
    for entry in manifest.entries:
        dot = f"{entry.name}." if entry.name else ""
        usual = (entry.name, f"{dot}weight")
        computed = [f"{dot}parametrizations.weight.original{i}" for i in ("", "0", "1")]
        computed += [f"{dot}weight_v", f"{dot}weight_g", f"{dot}weight_orig"]
        named = [n for n in usual if n in parameters][:1] or [n for n in computed if n in parameters]
        if not named:
            nothing.append(f"entry {entry.name} names no parameter")
        for name in named:
            sites[id(parameters[name])].append(entry)
    return sites, nothing


def check_manifest(found: Findings, manifest: Any, model: nn.Module, uses: dict[str, Use], attended: set[str]) -> None:
    """Hold the manifest to what was multiplied by: every such parameter exactly once, along the right axis."""
    sites, problems = sites_by_parameter(manifest, model)
    parameters = dict(model.named_parameters())
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    gathered = []
    for name, use in uses.items():
        entries = sites.get(id(parameters[name]), [])
        if not entries and use.how not in WEIGHT_LIKE:
            gathered.append(name)
        elif not entries:
            operators = ", ".join(sorted(use.operators))
            problems.append(
                f"{name} {list(parameters[name].shape)} reaches {operators} ({use.how}), and is not in the manifest"
            )
        distinct = {e.name for e in entries}
        if len(distinct) < len(entries):
            problems.append(f"{name} is in the manifest {len(entries)} times")
        elif len(entries) > len(names[id(parameters[name])]):
            problems.append(f"{name} is in the manifest as {sorted(distinct)}")
        if sum(e.converted for e in entries) > 1:
            problems.append(f"{name} is converted twice: {sorted(distinct)}")
        for e in entries:
            shape = tuple(parameters[name].shape)
            if e.shape not in ((), shape):
                problems.append(f"{name} is {shape}, its entry says {e.shape}")
            if e.converted and use.axis is not None and use.axis != e.axis % len(shape):
                problems.append(f"{name} is summed over its axis {use.axis}, and converted along {e.axis}")
            if e.converted and use.how == "computed":
                problems.append(f"{name} is converted, and a function of it is multiplied by")
            if e.converted and use.groups > 1:
                problems.append(f"{name} is converted, and of a grouped convolution")
    used = {e.name for u in uses for e in sites.get(id(parameters[u]), [])}
    unused = [e.name for e in manifest.entries if e.name not in used]
    wide = [n for n, p in parameters.items() if p.dim() > 1]
    others = [n for n in wide if n not in uses and id(parameters[n]) not in sites]
    found.say(
        "manifest", problems, multiplied=len(uses), gathered=gathered, unused=len(unused), unused_names=unused[:8],
        attended=sorted(attended - set(uses)), never_multiplied=len(others), never_multiplied_names=others[:8],
    )  # fmt: skip


def flops(manifest: Any, model: nn.Module, uses: dict[str, Use], found: Findings) -> dict[str, Any]:
    """Share of the prunable operations whose weight was converted, and what the others are."""
    sites, _ = sites_by_parameter(manifest, model)
    parameters = dict(model.named_parameters())
    weights = {name: use for name, use in uses.items() if use.how in WEIGHT_LIKE}
    total = sum(use.flops for use in weights.values())
    prunable = {name: use for name, use in weights.items() if use.groups == 1 and use.length % M == 0}
    sum_of = sum(use.flops for use in prunable.values())
    taken, causes, examples = 0.0, Counter(), {}
    for name, use in prunable.items():
        entries = sites.get(id(parameters[name]), [])
        if any(e.converted for e in entries):
            taken += use.flops
            continue
        cause = general(entries[0].reason) if entries else "not in the manifest"
        causes[cause] += use.flops
        examples.setdefault(cause, []).append(name)
    exceptions = [
        {"cause": cause, "share": share / sum_of if sum_of else 0, "weights": len(examples[cause]), "such_as": examples[cause][:4]}
        for cause, share in causes.most_common()
    ]  # fmt: skip
    problems = [
        f"{e['such_as'][0]}: {e['cause']} ({e['share']:.1%})" for e in exceptions if e["cause"] == "not in the manifest"
    ]
    found.say("flops", problems)
    return {
        "flops": total,
        "prunable_share": sum_of / total if total else 0.0,
        "converted_share": taken / sum_of if sum_of else None,
        "exceptions": exceptions,
    }


def general(reason: str) -> str:
    """Leave away the numbers of a reason, so that like ones count together."""
    return re.sub(r"\d[\d,]*", "#", reason)


def answers(model: nn.Module, arguments: Arguments, training: bool) -> list[Tensor]:
    model.train(training)
    seed()
    with torch.no_grad():
        return [t.detach().clone() for t in tensors_of(call(model, arguments))]


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Give the largest difference, relative to the largest value; 0 is bit-equal, infinity another shape."""
    if [(t.shape, t.dtype) for t in left] != [(t.shape, t.dtype) for t in right]:
        return math.inf
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if torch.equal(a, b) or not a.numel():
            continue
        if not a.is_floating_point():
            return math.inf
        a, b = a.double(), b.double()
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return math.inf
        finite = torch.isfinite(b)
        if bool(finite.any()):
            a, b = a[finite], b[finite]
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def check_faithful(found: Findings, prefix: str, entry: Entry, converted: nn.Module | None = None) -> None:
    """Compare the converted model with a fresh one that got the finalized weights, through both modes and back."""
    if converted is None:
        converted = nmgraph.convert(built(entry), method=METHOD, pattern=f"{N}:{M}")
    kind = type(converted)
    finished = nmgraph.finalize(converted, force=True)
    problems = [] if type(finished) is kind else [f"finalize gives a {type(finished).__name__}, not a {kind.__name__}"]
    reloaded = fresh(entry)
    reloaded.load_state_dict(finished.state_dict(), strict=True)
    del finished
    worst, outputs, strange = 0.0, 0, False
    for time in ("before", "after switching modes"):
        for training in (False, True):
            arguments = arguments_of(entry, training)
            theirs = answers(reloaded, copy.deepcopy(arguments), training)
            ours = answers(converted, arguments, training)
            apart = difference(ours, theirs)
            outputs = max(outputs, len(theirs))
            strange = strange or not all(bool(torch.isfinite(t).all()) for t in theirs if t.is_floating_point())
            worst = max(worst, apart)
            if apart > TOLERANCE:
                mode = "training" if training else "evaluation"
                problems.append(f"{mode}, {time}: outputs differ by {apart:.1e}")
    facts = {
        "worst": worst if math.isfinite(worst) else "other shapes or values",
        "bit_equal": worst == 0,
        "outputs": outputs,
    }
    found.say(f"{prefix}faithful", problems, **facts, **({"not_finite": True} if strange else {}))


def check_training(found: Findings, prefix: str, entry: Entry, method: str) -> None:
    """Train: every converted weight that has a gradient changes in one step; after it the finalized one is N:M."""
    steps = 1 if method == METHOD else 2
    model = nmgraph.convert(built(entry), method=method, pattern=f"{N}:{M}").train()
    entries = nmgraph.manifest(model).converted
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {e.name: parameters.get(f"{e.name}.weight".lstrip("."), parameters.get(e.name)) for e in entries}
    lost = [name for name, weight in weights.items() if weight is None]
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    axes = {e.name: e.axis for e in entries}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    nmgraph.attach(model, optimizer, total_steps=steps)
    unchanged, without = [f"{name} has no parameter" for name in lost], []
    for step in range(steps):
        arguments = arguments_of(entry, True)
        seed()
        loss = loss_of(call(model, arguments))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        largest = max((float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None), default=1.0)
        scale = 1 / largest if largest and math.isfinite(largest) else 1.0
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(scale)
        dead = {name for name, w in weights.items() if w.grad is None or not bool(w.grad.count_nonzero())}
        optimizer.step()
        if step == 0:
            without = sorted(dead)
            unchanged += [n for n, w in weights.items() if n not in dead and torch.equal(w.detach(), before[n])]
        del before
    problems = [f"{name} did not change" for name in unchanged]
    problems += [] if math.isfinite(float(loss)) else [f"the loss is {float(loss)}"]
    problems += [] if len(without) < len(weights) else ["no converted weight has a gradient: this run shows nothing"]
    found.say(f"{prefix}training", problems, changed=len(weights) - len(without) - len(unchanged), without_gradient=len(without), without_gradient_names=without[:8])  # fmt: skip
    model.zero_grad(set_to_none=True)
    found.attempt(f"{prefix}pattern", lambda: check_pattern(found, prefix, model, axes))
    if method != METHOD:
        found.attempt(f"{prefix}faithful", lambda: check_faithful(found, prefix, entry, model))


def loss_of(output: Any) -> Tensor:
    """Make a number that depends on every output."""
    total = torch.zeros(())
    for i, t in enumerate(tensors_of(output)):
        if t.requires_grad and t.is_floating_point() and t.numel():
            weights = torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape) * (-1) ** i
            finite = torch.where(torch.isfinite(t), t, torch.zeros_like(t))
            total = total + (finite * weights).sum() / math.sqrt(t.numel())
    return total


def check_pattern(found: Findings, prefix: str, model: nn.Module, axes: dict[str, Any]) -> None:
    """Count the non-zeros of every block of the finalized weights, in plain tensor code."""
    finished = nmgraph.finalize(model, force=True)
    parameters = dict(finished.named_parameters(remove_duplicate=False))
    problems = []
    for name, axis in axes.items():
        weight = parameters.get(f"{name}.weight".lstrip("."), parameters.get(name))
        if weight is None:
            problems.append(f"{name} has no parameter")
        elif not holds(weight.detach(), axis):
            problems.append(f"{name} is not {N}:{M} along axis {axis}")
        elif bool((weight == 0).all()):
            problems.append(f"{name} is all zero")
    found.say(f"{prefix}pattern", problems, sites=len(axes))


def holds(weight: Tensor, axis: int) -> bool:
    rows = weight.movedim(axis, -1)
    return rows.shape[-1] % M == 0 and int(rows.reshape(-1, M).count_nonzero(1).max()) <= N


def symbolic_trace(entry: Entry) -> str:
    """Try plain torch.fx; give what went wrong, or nothing."""
    model = built(entry)
    try:
        torch.fx.symbolic_trace(model)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def modelopt(entry: Entry, uses: dict[str, Use]) -> dict[str, Any] | None:
    """Let ModelOpt sparsify the model by magnitude; None where it is not installed."""
    try:
        import modelopt.torch.sparsity as mts
    except ImportError:
        return None
    model = built(entry)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    shared = {name for name, p in model.named_parameters() if id(p) in tables}
    try:
        mts.sparsify(model, "sparse_magnitude", config={"verbose": False})
        model = mts.export(model)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    after = dict(model.named_parameters())
    weights = {name: use for name, use in uses.items() if use.how in WEIGHT_LIKE}
    total, made, questionable, operations = 0, 0, [], 0.0
    prunable = sum(use.flops for use in weights.values() if use.groups == 1 and use.length % M == 0)
    for name in before:
        if name not in after:
            questionable.append(f"{name} is gone")
            continue
        use = weights.get(name)
        total += before[name].numel() if use else 0
        if torch.equal(before[name], after[name]):
            continue
        if use is None:
            questionable.append(f"{name} is in no product of the run, and was pruned")
            continue
        if use.groups > 1:
            questionable.append(f"{name} is of a grouped convolution, and was pruned")
        elif name in shared:
            questionable.append(f"{name} is an embedding, too, and was pruned")
        elif use.how == "computed":
            questionable.append(f"{name} was pruned, and a function of it is multiplied by")
        elif not holds(after[name].detach(), 1 if use.axis is None else use.axis):
            questionable.append(f"{name} was pruned, and is not {N}:{M} along the axis summed over")
        else:
            made += before[name].numel()
            operations += use.flops
    return {
        "share_of_weights": made / total if total else 0.0,
        "share_of_prunable_flops": operations / prunable if prunable else None,
        "questionable": shortened(questionable),
    }


def check_onnx(entry: Entry) -> dict[str, Any]:
    """Export by way of ONNX where the dense model can be: does the proof hold, does ONNX Runtime agree?"""
    warnings.simplefilter("ignore")
    dense = built(entry).eval()
    arguments = arguments_of(entry, False)
    positional, named = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
    try:
        with torch.no_grad():
            torch.onnx.export(dense, positional, kwargs=named, dynamo=True, verbose=False)
    except Exception as error:
        return {"dense": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    converted = nmgraph.convert(dense, method=METHOD, pattern=f"{N}:{M}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = nmgraph.export(converted, Path(folder) / "out", example_inputs=arguments)
        except Exception as error:
            return {"dense": "", "problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    assert report.onnx is not None
    assert report.parity is not None
    return {"dense": "", "holds": report.holds, "proved": sum(c.expected and c.holds for c in report.onnx.checks), "relative_error": report.parity.worst}  # fmt: skip
