"""What damaged and hostile files, and killed processes, do to load, verify, save and export.

    python benchmarks/faults_files.py --json benchmarks/results/faults_files.json

Mutations: small files of every kind are damaged in the ways of MUTATIONS, drawn by a seed, and read in child processes,
each file within SECONDS and MEMORY. A damaged file has to be refused with an NMGraphError, or to be read. `.nm.pt` has
checksums, so one that is read has to be the original in every tensor; of those that were repaired after the damage, and of
`.safetensors` and `.onnx`, which have no checksums, an answer is all that can be asked. Whatever runs a program, opens a
connection or writes a file is noted by an audit hook.

Hostile files: HOSTILE, each of which would leave a file behind if what it holds ran, through load, verify and open_dense.

Kills: child processes that save or export again and again are killed at random moments. The path has to hold one of the
two whole models that were written there, every time. A process that only replaces a directory, in memory, is killed in
the middle of that far more often.
"""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import record
import torch
from torch import nn

import nmgraph
from nmgraph.checkpoint.dense_file import open_dense
from nmgraph.errors import NMGraphError
from nmgraph.files import directory_written_atomically

SEED = 0
SECONDS = 5.0
MEMORY = 1 << 30  # bytes beyond what the process has before it reads
BATCH = 250  # files read by one child process
HUGE = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
NOTED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.bind")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)
    )


def trained(method: str, steps: int = 3, seed: int = SEED) -> nn.Module:
    """Give a converted network in the middle of its training."""
    torch.manual_seed(seed)
    model = nmgraph.convert(network(), method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.attach(model, optimizer, total_steps=2 * steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 8, 8)).square().mean().backward()
        optimizer.step()
    return model


# Mutations -----------------------------------------------------------------------------------------------------------


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def swapped(data: bytes, draw: random.Random) -> bytes:
    size = draw.randint(1, max(1, len(data) // 8))
    one, other = sorted((draw.randrange(len(data) - size + 1), draw.randrange(len(data) - size + 1)))
    other = max(other, min(one + size, len(data) - size))
    return (
        data[:one]
        + data[other : other + size]
        + data[one + size : other]
        + data[one : one + size]
        + data[other + size :]
    )


def cut_or_doubled(data: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.randint(1, 256))
    return data[:begin] + draw.choice((b"", 2 * data[begin:end], draw.randbytes(end - begin))) + data[end:]


def with_huge_number(data: bytes, draw: random.Random) -> bytes:
    """Put a number that is too large over some bytes: those of a header, often."""
    size = draw.choice((2, 4, 8))
    number = (draw.choice(HUGE) % (1 << 8 * size)).to_bytes(size, draw.choice(("little", "big")))
    place = draw.choice(
        (draw.randrange(min(len(data), 2048)), draw.randrange(len(data)), -draw.randint(1, min(len(data), 512)))
    )
    place %= len(data)
    return data[:place] + number + data[place + size :]


BYTES = {f.__name__: f for f in (flipped, truncated, swapped, cut_or_doubled, with_huge_number)}


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: dict[str, bytes]) -> bytes:
    """Write members with checksums that hold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def repaired_pickle(data: bytes, draw: random.Random) -> bytes:
    members = members_of(data)
    name = next(name for name in members if name.endswith("data.pkl"))
    return zipped(members | {name: draw.choice(list(BYTES.values()))(members[name], draw)})


def repaired_member(data: bytes, draw: random.Random) -> bytes:
    members = members_of(data)
    name = draw.choice([name for name in members if members[name]])
    return zipped(members | {name: draw.choice(list(BYTES.values()))(members[name], draw)})


def swapped_members(data: bytes, draw: random.Random) -> bytes:
    members = members_of(data)
    one, other = draw.sample(sorted(members), 2)
    return zipped(members | {one: members[other], other: members[one]})


def inner_module(data: bytes, draw: random.Random) -> bytes:
    """Damage the pickled module within the file, whose checksums are made right."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    module = repaired_pickle(content["module"].numpy().tobytes(), draw)
    buffer = io.BytesIO()
    torch.save(content | {"module": torch.frombuffer(bytearray(module), dtype=torch.uint8)}, buffer)
    return buffer.getvalue()


def json_value(values: Any, draw: random.Random) -> Any:
    """Replace one value somewhere in plain values."""
    if isinstance(values, dict) and values and draw.random() < 0.9:
        key = draw.choice(sorted(values))
        if draw.random() < 0.05:
            return {k: v for k, v in values.items() if k != key}
        return values | {key: json_value(values[key], draw)}
    if isinstance(values, list) and values and draw.random() < 0.9:
        place = draw.randrange(len(values))
        return [*values[:place], json_value(values[place], draw), *values[place + 1 :]]
    if isinstance(values, str) and values[:1] in ("{", "[") and draw.random() < 0.9:
        return json.dumps(json_value(json.loads(values), draw))
    return draw.choice((None, True, -1, 0.5, "", "x", [], {}, [[]], "9:4", "4:8", *HUGE))


def safetensors_header(data: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json_value(json.loads(data[8 : 8 + length]), draw)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def onnx_message(data: bytes, draw: random.Random) -> bytes:
    """Change one field somewhere in the message."""
    model = onnx.load_from_string(data)
    message: Any = model
    while True:
        fields = message.ListFields()
        if not fields:
            return model.SerializeToString()
        field, value = draw.choice(fields)
        if field.message_type is None:
            break
        message = draw.choice(list(value)) if field.is_repeated else value
    if field.is_repeated:
        items = list(value)
        items[draw.randrange(len(items))] = _other(items[0], draw)
        del value[:]
        value.extend(items)
    elif draw.random() < 0.2:
        message.ClearField(field.name)
    else:
        with contextlib.suppress(ValueError, TypeError):  # no such number in this field
            setattr(message, field.name, _other(value, draw))
    return model.SerializeToString()


def _other(value: Any, draw: random.Random) -> Any:
    if isinstance(value, (str, bytes)):
        kind = type(value)
        others = (
            "",
            "x",
            "Transpose",
            "Split",
            "Gather",
            "Slice",
            "Einsum",
            "MatMul",
            "Cast",
            "Conv",
            "{}",
            "[" * 5000,
        )
        return draw.choice([kind(o, "ascii") if kind is bytes else o for o in others] + [value[: len(value) // 2]])
    return draw.choice((-1, 0, 1, 2, 7, 2**31 - 1, 2**40 if isinstance(value, float) else 2**20, -(2**31)))


MUTATIONS: dict[str, dict[str, Callable[[bytes, random.Random], bytes]]] = {
    "nm.pt": {**BYTES, "repaired_pickle": repaired_pickle, "repaired_member": repaired_member,
              "swapped_members": swapped_members, "inner_module": inner_module},
    "safetensors": {**BYTES, "safetensors_header": safetensors_header},
    "onnx": {**BYTES, "onnx_message": onnx_message},
}  # fmt: skip


@dataclass(frozen=True)
class Original:
    """A file to damage: what it is, its bytes, and the state of the model in it where that is compared."""

    name: str
    kind: str
    data: bytes
    state: dict[str, torch.Tensor] | None = None


def originals(directory: Path) -> list[Original]:
    made = []
    for method in ("lbc", "bimask"):
        model, path = trained(method), directory / f"{method}.nm.pt"
        nmgraph.save(model, path)
        made.append(Original(f"{method}.nm.pt", "nm.pt", path.read_bytes(), model.state_dict()))
    export = directory / "export"
    nmgraph.export(trained("srste"), export, safetensors=True, example_inputs=torch.randn(1, 4, 8, 8))
    for kind in ("safetensors", "onnx"):
        made.append(Original(f"model.{kind}", kind, (export / f"model.{kind}").read_bytes()))
    return made


def read(original: Original, path: Path) -> list[tuple[str, Callable[[], Any]]]:
    """List the ways in which a file is read."""
    ways: list[tuple[str, Callable[[], Any]]] = [("verify", lambda: nmgraph.verify(path).to_dict())]
    if original.kind == "nm.pt":
        ways.append(("load", lambda: nmgraph.load(path).state_dict()))
    if original.kind == "safetensors":
        ways.append(("load", lambda: nmgraph.load(path, model=network()).state_dict()))
    return ways


def judged(original: Original, mutation: str, path: Path, way: str, work: Callable[[], Any]) -> tuple[str, str]:
    """Read a file; say what came of it, and what is wrong with that, if anything is."""
    try:
        answer = work()
    except NMGraphError as error:
        chain, link = [], error
        while link is not None:
            chain.append(f"{type(link).__name__} {link}")
            link = link.__cause__
        scarce = any("MemoryError" in said or "allocate" in said or "bad_alloc" in said for said in chain)
        return ("refused", f"more memory was asked for: {' < '.join(chain)}"[:600]) if scarce else ("refused", "")
    except BaseException:
        return "another exception", traceback.format_exc(limit=-4)[-1200:]
    if way == "load" and original.state is not None:
        same = answer.keys() == original.state.keys() and all(
            torch.equal(answer[key], tensor) for key, tensor in original.state.items()
        )
        if not same:
            return "loaded otherwise", "" if mutation not in BYTES else "a tensor differs from the original"
    return "read", ""


def child(connection: Any, made: list[Original], numbers: range, directory: Path) -> None:
    """Damage and read the files of these numbers, and tell of each before and after."""
    events: list[str] = []
    sys.addaudithook(lambda event, args: _note(events, event, args))
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    for number in numbers:
        draw = random.Random(f"{SEED}.{number}")
        original = made[number % len(made)]
        mutation = draw.choice(sorted(MUTATIONS[original.kind]))
        damaged = MUTATIONS[original.kind][mutation](original.data, draw)
        path = directory / f"{os.getpid()}.{original.kind}"
        path.write_bytes(damaged)
        events.clear()
        for way, work in read(original, path):
            connection.send(("began", number, original.name, mutation, way))
            began = time.perf_counter()
            outcome, wrong = judged(original, mutation, path, way, work)
            taken = time.perf_counter() - began
            if events:
                wrong = f"{wrong} ran {events}"
            if damaged == original.data:
                outcome = "unchanged"
            connection.send(("ended", outcome, wrong, taken))
        path.unlink()
    connection.send(("done", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def _note(events: list[str], event: str, args: tuple[Any, ...]) -> None:
    if event in NOTED or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")):
        events.append(f"{event} {args[0]}"[:200])


def mutations(count: int) -> dict[str, Any]:
    """Read that many damaged files."""
    outcomes: dict[str, Counter[str]] = {}
    wrong: list[dict[str, Any]] = []
    slowest, largest = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        made = originals(Path(folder))
        numbers = range(count)
        for begin in range(0, count, BATCH):
            left = numbers[begin : begin + BATCH]
            while left:
                ours, theirs = multiprocessing.Pipe(duplex=False)
                process = multiprocessing.get_context("fork").Process(
                    target=child, args=(theirs, made, left, Path(folder))
                )
                process.start()
                theirs.close()
                current: Any = None
                while True:
                    try:
                        told = ours.recv() if ours.poll(4 * SECONDS) else ("hung",)
                    except EOFError:
                        told = ("crashed",)
                    if told[0] == "began":
                        current = told[1:]
                    elif told[0] == "ended":
                        _, outcome, problem, taken = told
                        slowest = max(slowest, taken)
                        outcomes.setdefault(f"{current[1]} {current[2]} {current[3]}", Counter())[outcome] += 1
                        if taken > SECONDS:
                            problem += f" took {taken:.1f} s"
                        if problem:
                            wrong.append({"number": current[0], "file": " ".join(current[1:]), "wrong": problem})
                    elif told[0] == "done":
                        largest = max(largest, told[1])
                        left = range(0)
                        break
                    else:
                        wrong.append({"number": current[0], "file": " ".join(current[1:]), "wrong": told[0]})
                        left = range(current[0] + 1, left.stop)
                        break
                process.kill()
                process.join()
    totals: Counter[str] = sum(outcomes.values(), Counter())
    return {
        "files": count,
        "reads": totals.total(),
        "outcomes": dict(totals),
        "by_file": {name: dict(found) for name, found in sorted(outcomes.items())},
        "slowest_s": slowest,
        "peak_rss_mb": largest / 1024,
        "wrong": wrong,
    }


# Hostile files -------------------------------------------------------------------------------------------------------


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class HasState:
    """Pickles as an object that is given a state."""

    def __init__(self, made: Any, state: Any) -> None:
        self.parts = made, state

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self.parts[0]), (), self.parts[1]


def touch(canary: Path) -> Runs:
    return Runs(os.system, f"touch {canary}")


def imported(canary: Path) -> Runs:
    """Name a function of a module that leaves the canary when it is imported."""
    (canary.parent / "faults_imported.py").write_text(f"open({str(canary)!r}, 'w')\ndef build(): pass\n")
    sys.path.insert(0, str(canary.parent))
    module = type(sys)("faults_imported")

    def build() -> None:
        pass

    build.__module__, build.__qualname__, module.build = "faults_imported", "build", build  # type: ignore[attr-defined]
    sys.modules["faults_imported"] = module
    return Runs(build)


def graph_module(canary: Path) -> Any:
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    body = {**graph.__dict__, "_code": f"open({str(canary)!r}, 'w')\ndef forward(self, x):\n    return x\n"}
    return Runs(torch.fx.graph_module.reduce_graph_module, body, "")


def save_torch(content: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    return lambda path, canary: torch.save(content(canary), path)


def save_archive(path: Path, **members: bytes) -> None:
    names = {name.replace("__", "/").replace("_pkl", ".pkl"): content for name, content in members.items()}
    path.write_bytes(zipped({f"model/{name}": content for name, content in names.items()}))


def save_opcodes(opcodes: bytes) -> Callable[[Path, Path], None]:
    return lambda path, canary: save_archive(
        path, data_pkl=opcodes.replace(b"%s", f"touch {canary}".encode()), version=b"3\n", byteorder=b"little"
    )


def save_pickle(protocol: int) -> Callable[[Path, Path], None]:
    return lambda path, canary: path.write_bytes(pickle.dumps(touch(canary), protocol))


def save_legacy(path: Path, canary: Path) -> None:
    torch.save({"state_dict": touch(canary)}, path, _use_new_zipfile_serialization=False)


def save_tar(path: Path, canary: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(touch(canary), 2)
            told = tarfile.TarInfo(name)
            told.size = len(content)
            archive.addfile(told, io.BytesIO(content))


def save_numpy(many: bool) -> Callable[[Path, Path], None]:
    def save(path: Path, canary: Path) -> None:
        array = np.array([touch(canary)], dtype=object)
        with path.open("wb") as file:
            np.savez(file, a=array) if many else np.save(file, array, allow_pickle=True)

    return save


def save_package(path: Path, canary: Path) -> None:
    with torch.package.PackageExporter(str(path)) as exporter:
        exporter.save_source_string("hostile", f"open({str(canary)!r}, 'w')\n")
        exporter.save_pickle("model", "model.pkl", nn.Linear(2, 2), dependencies=False)
        exporter.extern("**")


def save_torchscript(path: Path, canary: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    members = members_of(path.read_bytes())
    hidden = pickle.dumps(touch(canary), 2)
    path.write_bytes(
        zipped({n: hidden if n.endswith(("data.pkl", "constants.pkl")) else c for n, c in members.items()})
    )


def save_exported(path: Path, canary: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    buffer = io.BytesIO()
    torch.save(touch(canary), buffer)
    members = members_of(path.read_bytes())
    path.write_bytes(zipped({n: buffer.getvalue() if "sample_inputs" in n else c for n, c in members.items()}))


def save_nested_zip(path: Path, canary: Path) -> None:
    buffer = io.BytesIO()
    torch.save(touch(canary), buffer)
    save_archive(path, data_pkl=buffer.getvalue(), version=b"3\n", byteorder=b"little")


def save_inner_module(path: Path, canary: Path) -> None:
    nmgraph.save(trained("srste", steps=1), path)
    content, buffer = torch.load(path, weights_only=True), io.BytesIO()
    torch.save(touch(canary), buffer)
    torch.save(content | {"module": torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)}, path)


HOSTILE: dict[str, Callable[[Path, Path], None]] = {
    "os.system": save_torch(touch),
    "in a state_dict": save_torch(lambda canary: {"state_dict": {"weight": torch.zeros(2), "x": touch(canary)}}),
    "eval": save_torch(lambda canary: Runs(eval, f"open({str(canary)!r}, 'w')")),
    "exec": save_torch(lambda canary: Runs(exec, f"open({str(canary)!r}, 'w')")),
    "open": save_torch(lambda canary: Runs(open, str(canary), "w")),
    "subprocess": save_torch(lambda canary: Runs(subprocess.call, ["touch", str(canary)])),
    "chain of calls": save_torch(lambda canary: Runs(getattr, Runs(__import__, "os"), "system")),
    "call of a call": save_torch(lambda canary: Runs(map, os.system, [f"touch {canary}"])),
    "module attribute": save_torch(lambda canary: [nn.Linear(2, 2), {"hook": touch(canary)}]),
    "in a module": save_torch(lambda canary: _with_attribute(nn.Linear(2, 2), touch(canary))),
    "import": save_torch(imported),
    "GraphModule": save_torch(graph_module),
    "getattr": save_opcodes(b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'%s'\ntR."),
    "attribute of a class": save_opcodes(b"ctorch.nn\nModule.__init__.__globals__\n(S'%s'\ntR."),
    "what a module imports": save_opcodes(b"ctorch.nn.modules.module\ntorch.os.system\n(S'%s'\ntR."),
    "constructor of a layer": save_torch(lambda canary: Runs(nn.Linear, 1 << 17, 1 << 17)),
    "constructor through a tensor": save_torch(
        lambda canary: Runs(torch._tensor._rebuild_from_type_v2, nn.Linear, nn.Linear, (1 << 17, 1 << 17), {})
    ),
    "much memory": save_torch(lambda canary: Runs(bytearray, 1 << 36)),
    "large tensor of one number": save_torch(lambda canary: {"weight": torch.zeros(1).expand(1 << 20, 1 << 20)}),
    "pickle in the stored module": save_inner_module,
    "older torch.save": save_legacy,
    "oldest torch.save": save_tar,
    **{f"pickle of protocol {protocol}": save_pickle(protocol) for protocol in range(6)},
    "numpy array of objects": save_numpy(many=False),
    "numpy arrays of objects": save_numpy(many=True),
    "numpy in torch.save": save_torch(lambda canary: {"weight": np.array([touch(canary)], dtype=object)}),
    "torch.package": save_package,
    "TorchScript": save_torchscript,
    "torch.export": save_exported,
    "zip in a zip": save_nested_zip,
}


def _with_attribute(module: nn.Module, value: Any) -> nn.Module:
    module.extra = value
    return module


WAYS: dict[str, Callable[[Path], Any]] = {
    "load": nmgraph.load,
    "load into a model": lambda path: nmgraph.load(path, model=network()),
    "verify": nmgraph.verify,
    "open_dense": open_dense,
    "open_dense with a factory": lambda path: open_dense(path, factory="torch.nn:Identity"),
}
NOT_LOOKED_AT = ("pickle in the stored module", "load into a model")
SUFFIXES = (".nm.pt", ".pt", ".safetensors", ".onnx")


def attacked(name: str, directory: Path) -> list[str]:
    """Read one hostile file in all ways, under all suffixes; say what went wrong."""
    canary, original = directory / "canary", directory / "hostile"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        HOSTILE[name](original, canary)
    sys.modules.pop("faults_imported", None)
    canary.unlink(missing_ok=True)
    wrong = []
    for suffix in SUFFIXES:
        path = directory / f"hostile{suffix}"
        path.write_bytes(original.read_bytes())
        for way, work in WAYS.items():
            try:
                work(path)
                if (name, way) != NOT_LOOKED_AT:
                    wrong.append(f"{name}, {suffix}, {way}: was read")
            except NMGraphError:
                pass
            except Exception as error:
                wrong.append(f"{name}, {suffix}, {way}: {type(error).__name__}: {error}")
            if canary.exists():
                wrong.append(f"{name}, {suffix}, {way}: ran")
                canary.unlink()
    return wrong


def hostile() -> dict[str, Any]:
    """Read every hostile file in every way."""
    wrong = []
    for name in HOSTILE:
        with tempfile.TemporaryDirectory() as folder:
            wrong += attacked(name, Path(folder))
    reads = len(HOSTILE) * len(SUFFIXES) * len(WAYS)
    return {"files": len(HOSTILE), "reads": reads, "names": list(HOSTILE), "wrong": wrong}


# Kills ---------------------------------------------------------------------------------------------------------------


def large(seed: int) -> nn.Module:
    """Give a converted model of some megabytes, whose writing takes a while; a seed makes its weights."""
    torch.manual_seed(seed)
    return nmgraph.convert(nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)), method="srste")


def save(model: nn.Module, path: Path) -> None:
    nmgraph.save(model, path)


def export_weights(model: nn.Module, path: Path) -> None:
    nmgraph.export(model, path, onnx=False, safetensors=True, overwrite=True)


def export_onnx(model: nn.Module, path: Path) -> None:
    nmgraph.export(model, path, safetensors=True, overwrite=True, example_inputs=torch.ones(1, 512))


WRITES: dict[str, Callable[[nn.Module, Path], None]] = {
    "save": save,
    "export_weights": export_weights,
    "export_onnx": export_onnx,
}


def weights_at(path: Path) -> list[torch.Tensor]:
    """Give the masked weights of what lies there, whole."""
    if path.is_file():
        return [layer.weight for layer in nmgraph.finalize(nmgraph.load(path)) if hasattr(layer, "weight")]
    for file in json.loads((path / "report.json").read_text())["files"]:
        assert (path / file).stat().st_size
    if (path / "model.onnx").exists():
        assert nmgraph.verify(path / "model.onnx").holds
    dense = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    return [layer.weight for layer in nmgraph.load(path / "model.safetensors", model=dense) if hasattr(layer, "weight")]


def write_for_ever(way: str, path: Path, models: list[nn.Module], connection: Any) -> None:
    connection.send("begins")
    while True:
        for model in models:
            WRITES[way](model, path)


def kills(way: str, count: int, seed: int = SEED) -> dict[str, Any]:
    """Kill a writing process so often, and look at the path after each time."""
    draw, wrong, found = random.Random(f"{seed}.{way}"), [], Counter[str]()
    models = [large(0), large(1)]
    finals = [[layer.weight for layer in nmgraph.finalize(model) if hasattr(layer, "weight")] for model in models]

    def which(path: Path) -> str:
        there = weights_at(path)
        same = [all(torch.equal(*pair) for pair in zip(there, final, strict=True)) for final in finals]
        return ("first", "second")[same.index(True)]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output"
        WRITES[way](models[0], path)  # the first imports what it needs
        began = time.perf_counter()
        WRITES[way](models[0], path)
        takes = time.perf_counter() - began
        for number in range(count):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(
                target=write_for_ever, args=(way, path, models, theirs)
            )
            process.start()
            ours.recv()
            time.sleep(draw.uniform(0, 2.5 * takes))
            alive = process.is_alive()
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            try:
                assert alive, f"the process ended by itself: {process.exitcode}"
                found[which(path)] += 1
            except Exception as error:
                wrong.append(f"kill {number}: {type(error).__name__}: {error}")
        leftovers = sum(p.name != path.name for p in Path(folder).iterdir())
        WRITES[way](models[1], path)
        if which(path) != "second":
            wrong.append("the run after the kills did not write")
    return {"kills": count, "found": dict(found), "leftovers_beside": leftovers, "one_takes_s": takes, "wrong": wrong}


def replace_for_ever(path: Path) -> None:
    while True:
        with directory_written_atomically(path) as temporary:
            (temporary / "a.txt").write_text("whole")


def directory_kills(count: int, seed: int = SEED) -> dict[str, Any]:
    """Kill a process that does nothing but replace a directory, in memory: most of its time is the replacing."""
    draw, lost = random.Random(seed), 0
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / "output"
        for _ in range(count):
            if not path.exists():
                with directory_written_atomically(path) as temporary:
                    (temporary / "a.txt").write_text("whole")
            process = multiprocessing.get_context("fork").Process(target=replace_for_ever, args=(path,))
            process.start()
            time.sleep(draw.uniform(0.004, 0.012))
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            lost += not (path / "a.txt").exists() or (path / "a.txt").read_text() != "whole"
        leftovers = sum(p != path for p in Path(folder).iterdir())
    wrong = [f"{lost} of {count} kills left no whole directory"] if lost else []
    return {"kills": count, "found": {"whole": count - lost}, "leftovers_beside": leftovers, "wrong": wrong}


def measure(quick: bool) -> dict[str, Any]:
    """Measure everything: a tenth of it if it shall be quick."""
    share = 10 if quick else 1
    numbers = {"save": 100, "export_weights": 80, "export_onnx": 20}
    return {
        "mutations": mutations(20_000 // share),
        "hostile": hostile(),
        "kills": {way: kills(way, count // share) for way, count in numbers.items()}
        | {"replaced directory": directory_kills(1000 // share)},
    }


def report(found: dict[str, Any]) -> bool:
    damaged = found["mutations"]
    print(
        f"{damaged['files']} damaged files, {damaged['reads']} reads: "
        f"{', '.join(f'{n} {outcome}' for outcome, n in damaged['outcomes'].items())}; slowest {damaged['slowest_s']:.2f} s, "
        f"peak RSS {damaged['peak_rss_mb']:.0f} MB, {len(damaged['wrong'])} wrong"
    )
    print(
        f"{found['hostile']['files']} hostile files, {found['hostile']['reads']} reads: {len(found['hostile']['wrong'])} wrong"
    )
    for way, each in found["kills"].items():
        print(
            f"{each['kills']} kills of {way}: {each['found']} whole, {each['leftovers_beside']} leftovers, {len(each['wrong'])} wrong"
        )
    wrong = [each for part in (damaged, found["hostile"], *found["kills"].values()) for each in part["wrong"]]
    for each in wrong:
        print(f"  wrong: {each}")
    return not wrong


if __name__ == "__main__":
    record.run(__doc__, measure, report, seed=SEED)
