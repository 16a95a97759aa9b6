"""Everything an export writes, as one directory that appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from nmgraph.errors import ExportError
from nmgraph.export import trt_files
from nmgraph.export.inputs import Inputs
from nmgraph.export.onnx_file import without_cache, write_onnx
from nmgraph.export.parity import Parity, compare, joined
from nmgraph.export.proof import load_onnx, verify_onnx
from nmgraph.export.trt_command import trtexec_line
from nmgraph.export.trt_report import EngineReport, TensorRT, write_engine
from nmgraph.export.trt_rules import sparsity_notes
from nmgraph.files import directory_written_atomically
from nmgraph.passes.compression import SCHEMA_KEY, Sizes, compress_state
from nmgraph.passes.manifest import MANIFEST_KEY, Manifest
from nmgraph.passes.projection import Projection
from nmgraph.passes.verification import Verification, verify_model

HF_DIRECTORY = "hf"
_OURS = (
    "model.onnx", "model.onnx.data", "model.safetensors", "manifest.json", "report.json", HF_DIRECTORY, *trt_files.FILES,
)  # fmt: skip
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ReadBack(Protocol):
    """What was found of a Hugging Face directory when it was read back."""

    @property
    def holds(self) -> bool:
        """Tell whether everything came back as it was."""

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what was found of it.

    Attributes:
        directory: where it lies.
        files: names in it, with their sizes in bytes.
        precision: of the weights.
        inputs: what was traced and compared with, in words.
        weights: the proof on the finalized model.
        onnx: the proof on the ONNX file, if one was written.
        parity: ONNX Runtime against the finalized model, if one was written.
        hugging_face: what ``from_pretrained`` gives back of the Hugging Face directory, if one was written.
        pruned: layers whose masks were unfinished, and were pruned because of ``force``.
        sizes: of the compressed weights, if they were written.
        projected: layers that were pruned further because of ``project``, with what that cost.
        folded: batch norms that were folded into the convolutions before them.
        engine: what was found of the TensorRT engine, if one was built.
        trtexec: the line that builds an engine from the ONNX file on another machine, if it was asked for.
        notes: what the patterns and the precision mean for TensorRT, if it was asked for.
    """

    directory: Path
    files: dict[str, int]
    precision: str
    inputs: str
    weights: Verification
    onnx: Verification | None
    parity: Parity | None
    pruned: tuple[str, ...] = ()
    sizes: Sizes | None = None
    projected: tuple[Projection, ...] = ()
    engine: EngineReport | None = None
    trtexec: str = ""
    notes: tuple[str, ...] = ()
    hugging_face: ReadBack | None = None
    folded: tuple[str, ...] = ()

    @property
    def checks(self) -> dict[str, Verification | Parity | ReadBack | EngineReport]:
        """What was checked, by name."""
        checks: dict[str, Verification | Parity | ReadBack | EngineReport | None] = {
            "finalized weights": self.weights,
            "ONNX file": self.onnx,
            "ONNX Runtime": self.parity,
            "Hugging Face": self.hugging_face,
            "TensorRT": self.engine,
        }
        return {name: check for name, check in checks.items() if check is not None}

    @property
    def holds(self) -> bool:
        """Tell whether every check held."""
        return all(check.holds for check in self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {
            "holds": self.holds,
            "checks": [{"check": name, "holds": c.holds, "found": str(c)} for name, c in self.checks.items()],
            "directory": str(self.directory),
            "files": self.files,
            "precision": self.precision,
            "inputs": self.inputs,
            "pruned": list(self.pruned),
            "weights": self.weights.to_dict(),
            "onnx": self.onnx.to_dict() if self.onnx else None,
            "parity": self.parity.to_dict() if self.parity else None,
            "hugging_face": self.hugging_face.to_dict() if self.hugging_face else None,
            "compression": self.sizes.to_dict() if self.sizes else None,
            "folded": list(self.folded),
            "projected": [asdict(p) for p in self.projected],
            "engine": self.engine.to_dict() if self.engine else None,
            "trtexec": self.trtexec,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return f"{'every check holds' if self.holds else 'A CHECK DID NOT HOLD'}: {self.directory}"

    def __rich__(self) -> RenderableType:
        return Group(self._table(), self.engine) if self.engine else self._table()

    def _table(self) -> Table:
        table = Table(title=escape(str(self)), title_justify="left", header_style="bold")
        for column in ("check", "result", "found"):
            table.add_column(column, overflow="fold")
        for name, check in self.checks.items():
            table.add_row(name, "[green]holds" if check.holds else "[red]fails", escape(str(check)))
        if self.pruned:
            names = f"{', '.join(self.pruned[:4])}{' ...' if len(self.pruned) > 4 else ''}"
            table.add_row(
                "training", "[yellow]forced", f"{len(self.pruned)} unfinished layers were pruned now: {names}"
            )
        if self.folded:
            table.add_row("batch norms", "folded", f"{len(self.folded)} into the convolutions before them")
        for p in self.projected:
            cost = f"{p.kept_weights:.1%} of its weights and {p.kept_magnitude:.1%} of their magnitude are left"
            table.add_row("projected", "", escape(f"{p.name}: {p.before} to {p.after}; {cost}"))
        for note in self.notes:
            table.add_row("TensorRT", "", escape(note))
        if self.inputs:
            table.add_row("inputs", "", escape(self.inputs))
        if self.sizes:
            table.add_row("compressed weights", f"{self.sizes.ratio:.2%}", str(self.sizes))
        for name, size in self.files.items():
            table.add_row("file", "", f"{escape(name)} ({decimal(size)})")
        return table


def dtype_of(precision: str, onnx: bool) -> torch.dtype:
    """Give the dtype of a precision.

    Raises:
        ExportError: if there is none, or an ONNX file in it could not be compared.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"there is no precision {precision!r}. Choose one of {', '.join(PRECISIONS)}.")
    if precision == "bf16" and onnx:
        raise ExportError(
            "ONNX Runtime has no bfloat16 kernels on the CPU, so a bf16 ONNX file could not be compared. Choose fp16 or "
            "fp32, or write only the weights with --no-onnx --safetensors."
        )
    return PRECISIONS[precision]


def require_export_directory(directory: Path) -> None:
    """Refuse to replace a directory that no export made.

    Raises:
        ExportError: if it holds anything, and not an export's report.
    """
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "report.json").is_file():
        raise ExportError(f"{directory} holds files that no export wrote, and is kept. Choose another place with -o.")
    if directory.is_file():
        raise ExportError(f"{directory} is a file, and is kept. Choose another place with -o.")


def write_bundle(
    model: nn.Module, directory: Path, manifest: Manifest, *, inputs: Inputs | None, precision: str, safetensors: bool,
    pruned: tuple[str, ...], projected: tuple[Projection, ...] = (), tensorrt: TensorRT | None = None,
    write_hf: Callable[[nn.Module, Path], ReadBack] | None = None, dynamic_batch: bool = False,
    folded: tuple[str, ...] = (), progress: Callable[[str], None],
) -> ExportReport:  # fmt: skip
    """Write a finalized model.

    Args:
        model: ordinary layers, in eval mode, on the CPU, in the precision.
        directory: appears whole, in place of an old one.
        manifest: of the conversion.
        inputs: to write ONNX with; None writes none.
        precision: what the weights are in.
        safetensors: write the finalized weights as ``model.safetensors``, compressed.
        pruned: layers that were unfinished, for the report.
        projected: layers that were pruned further, for the report.
        tensorrt: what is wanted of TensorRT, if anything is.
        write_hf: writes a Hugging Face directory and reads it back; None writes none.
        dynamic_batch: leave the batch of the ONNX file open; it is compared at two more sizes then.
        folded: batch norms that were folded, for the report.
        progress: called with what begins.

    Raises:
        ExportError: if the model cannot be exported; nothing is written then.
    """
    onnx_proof, parity, sizes, engine, read_back, trtexec = None, None, None, None, None, ""
    notes: tuple[str, ...] = ()
    with directory_written_atomically(directory, _OURS) as temporary:
        progress("checking weights")
        weights = verify_model(model)
        if inputs is not None:
            path = temporary / "model.onnx"
            with without_cache(model):
                progress("writing ONNX")
                write_onnx(model, inputs, path, manifest, dynamic_batch=dynamic_batch)
                progress("proving N:M on the ONNX file")
                onnx_file = load_onnx(path)
                onnx_proof = verify_onnx(onnx_file, "model.onnx")
                if tensorrt is None:
                    del onnx_file  # as large as the weights
                progress("comparing with ONNX Runtime")
                batches = [inputs, *(inputs.with_batch(n) for n in (1, 3) if dynamic_batch)]
                parity = joined(compare(model, path, each, PRECISIONS[precision]) for each in batches)
                if tensorrt is not None:
                    notes = sparsity_notes(manifest, onnx_proof, precision)
                    trtexec = trtexec_line(onnx_file, inputs)
                    if tensorrt.module is not None:
                        engine = write_engine(
                            tensorrt, temporary, model, onnx_file, inputs=inputs, precision=precision, proof=onnx_proof,
                            old=directory / trt_files.CACHE, progress=progress,
                        )  # fmt: skip
        if safetensors:
            progress("writing safetensors")
            sizes = _write_safetensors(model, temporary / "model.safetensors", manifest)
        if write_hf is not None:
            progress("writing the Hugging Face directory")
            read_back = write_hf(model, temporary / HF_DIRECTORY)
        (temporary / "manifest.json").write_text(manifest.to_json() + "\n")
        files = {
            f.relative_to(temporary).as_posix(): f.stat().st_size for f in sorted(temporary.rglob("*")) if f.is_file()
        }
        found = ExportReport(
            directory, files, precision, str(inputs or ""), weights, onnx_proof, parity, pruned,
            sizes=sizes, projected=projected, engine=engine, trtexec=trtexec, notes=notes, hugging_face=read_back, folded=folded,
        )  # fmt: skip
        _write_report(found, temporary / "report.json")
    return found


def _write_report(found: ExportReport, path: Path) -> None:
    """Write the report, and count it among the files; its size is in its own text."""
    text, found.files[path.name] = b"", 0
    while len(text) != found.files[path.name] or not text:
        found.files[path.name] = len(text)
        text = json.dumps(found.to_dict(), indent=2).encode() + b"\n"
    path.write_bytes(text)


def _write_safetensors(model: nn.Module, path: Path, manifest: Manifest) -> Sizes:
    tensors, schema, sizes = compress_state(model.state_dict(), manifest)
    metadata = {"format": "pt", MANIFEST_KEY: manifest.to_json(), SCHEMA_KEY: schema.to_json()}
    path.touch()  # as readable as a new file is here; safetensors would make it the owner's alone
    mode = path.stat().st_mode
    try:
        save_file(tensors, str(path), metadata)
        path.chmod(mode)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ExportError(
            f"safetensors can't store {type(model).__name__}: {error}. Export without --safetensors."
        ) from error
    return sizes
