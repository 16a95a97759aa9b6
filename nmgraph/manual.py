"""What ``--help`` says beside the options: what a command reads and writes, examples, exit codes."""

from __future__ import annotations

SUMMARY = """Train any PyTorch model under N:M sparsity, and export it proved.

nmgraph convert model.pt      writes model.nm.pt
(train: nmgraph.load, nmgraph.attach, your loop, nmgraph.save)
nmgraph export model.nm.pt    writes model-export/

MODEL may also be timm:resnet50, torchvision:resnet18, a Hugging Face directory, or weights with --model."""

GUIDES = """Guides: README.md and docs/ in the source; `nmgraph COMMAND --help` has examples of every command.

To complete commands, options and values: nmgraph --install-completion"""


def _page(reads: str, writes: str, quiet: str, *examples: str, failed: str = "") -> str:
    codes = f"0 fine, {f'1 {failed}, ' if failed else ''}2 the call or its input is wrong."
    return "\n".join(
        [
            f"[bold]Reads[/] {reads}",
            f"[bold]Writes[/] {writes}",
            f"[bold]With --quiet[/] it prints {quiet}",
            f"[bold]Exit codes[/] {codes}",
            "",
            "[bold]Examples[/]",
            *(f"  nmgraph {example}" for example in examples),
        ]
    )


METHODS = _page("nothing.", "nothing.", "the names, one a line.", "methods", "methods --quiet", "methods --json")
INSPECT = _page(
    "the model, and runs it if inputs are given or can be guessed; with --sensitivity many times.",
    "nothing; with --sensitivity, --budget and --recipe a recipe for `nmgraph convert --recipe`.",
    "one line: how many layers would be converted.",
    "inspect model.pt",
    "inspect timm:resnet50 --pattern 1:4",
    "inspect weights.pt --model timm:resnet50",
    "inspect bert/ --input input_ids=1x16:int64",
    "inspect model.pt --sensitivity --data batch.npz",
    "inspect net.pt --sensitivity --budget flops=0.5 --recipe half.json",
)
CONVERT = _page(
    "the model; with --input it is run once.",
    "model.nm.pt beside model.pt, or what -o names; an existing file only with --overwrite.",
    "the path of the written file.",
    "convert model.pt",
    "convert model.pt --method srste --set decay=1e-3",
    "convert model.pt --preset paper",
    "convert model.pt --recipe half.json",
    "convert model.pt --skip head --layer 'mlp.*=1:4'",
    "convert timm:resnet50 -o sparse/resnet50.nm.pt",
    "convert weights.pt --model my_package.nets:make",
)
STATUS = _page(
    "a converted model.",
    "nothing.",
    "one line: how many layers keep to their pattern.",
    "status model.nm.pt",
    "status model.nm.pt --model my_package.nets:make",
)
EXPORT = _page(
    "a converted model, trained.",
    "the directory model-export/ beside model.nm.pt, or what -o names: model.onnx, manifest.json, report.json, and "
    "what the options ask for; an existing one is replaced only with --overwrite.",
    "the path of the directory.",
    "export model.nm.pt",
    "export model.nm.pt --precision fp16 --trt",
    "export model.nm.pt --no-onnx --safetensors",
    "export bert.nm.pt --hf",
    "export model.nm.pt --force --overwrite",
    failed="a check of what was written did not hold",
)
REPORT = _page(
    "a converted model; with --log the training log, with --export what an export says of itself.",
    "model-report.html beside model.nm.pt, or what -o names; an existing file only with --overwrite.",
    "the path of the written file.",
    "report model.nm.pt",
    "report model.nm.pt --log run.jsonl",
    "report model.nm.pt --export model-export",
)
VERIFY = _page(
    "the file.",
    "nothing.",
    "one line: how many weights hold.",
    "verify model-export/model.onnx",
    "verify model.safetensors --pattern 1:4",
    "verify weights.pt --quiet && echo sparse",
    failed="a weight does not keep to its pattern",
)
BENCH = _page(
    "the files, and runs them.",
    "nothing.",
    "a line for each file: its median time, then its name.",
    "bench dense.onnx model-export/model.onnx",
    "bench model.onnx --input 8x3x224x224",
    "bench dense.plan sparse.plan",
)
