"""What a report says: of finished and unfinished models, with and without log and export, and of hostile files."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from commands import answer, call
from models import mlp
from reports import trained, with_attention
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError, FileError, MissingPackageError
from nmgraph.report.charts import draw_metric
from nmgraph.report.findings import gather
from nmgraph.report.html import render
from nmgraph.training.run_log import RunLog

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&\"'$x$\ud800"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained model's file, its log, and its export."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model, log = trained(folder)
    nmgraph.save(model, folder / "net.nm.pt")
    return folder / "net.nm.pt", log, nmgraph.export(model, folder / "net-export", safetensors=True).directory


def words(page):
    """Give the text of a page, without tags and scripts."""
    text = re.sub(r"<(style|script)>.*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def test_report_of_a_finished_model_shows_what_holds(run, tmp_path):
    model, log, export = run
    page = nmgraph.report(model, tmp_path / "report.html", log=log, export=export)
    said = words(page)
    assert "N:M holds in 2 of 2 converted layers, and every check of the export holds." in said
    assert "export: ONNX Runtime holds largest relative error" in said
    assert "model.safetensors" in said
    assert "lbc 2:4 (" in said
    assert "What is missing" not in said
    assert "What does not fit" not in said
    for quantity in ("loss", "kept", "flipped", "magnitude", "live combinations"):
        assert f"<h3>{quantity}</h3>" in page.read_text()


def test_report_names_the_class_that_a_root_with_a_parameter_of_its_own_had(tmp_path):
    model, log = with_attention(tmp_path)
    assert type(model).__name__ == "NMWithAttention"
    page = nmgraph.report(model, tmp_path / "report.html", log=log)
    assert "<title>WithAttention: lbc</title>" in page.read_text()
    assert "NMWithAttention" not in words(page)
    assert nmgraph.verify(model).subject == "WithAttention"
    with pytest.raises(ConversionError, match=r"^WithAttention is converted already"):
        nmgraph.convert(model, method="srste")


def test_charts_share_one_range_of_steps(tmp_path):
    _, log = with_attention(tmp_path)
    read = RunLog.read(log)
    short, long = (draw_metric(read, name, "key") for name in ("held_out_accuracy", "loss"))
    ticks = [re.findall(r'id="key-xtick_\d+".*?x="([\d.]+)"', svg, re.DOTALL) for svg in (short, long)]
    assert len(ticks[0]) > 3
    assert ticks[0] == ticks[1]


def test_no_more_than_nine_moments_of_a_layer_are_shown_the_first_and_the_last_among_them(tmp_path):
    model, log = trained(tmp_path)
    found = gather(model, log=log)
    again = [replace(found.log.pictures[0], step=step) for step in range(12)]
    page = render(replace(found, log=replace(found.log, pictures=[*again, *found.log.pictures[-1:]])))
    moments = re.findall(r"<figcaption>(.*?)<br>", page)
    assert len(moments) == 9 * len(found.converted)
    assert (moments[0], moments[8]) == ("step 0", "step 12")


def test_page_names_no_address_and_no_path(run, tmp_path):
    model, log, export = run
    text = nmgraph.report(model, tmp_path / "report.html", log=log, export=export).read_text()
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", re.sub(r'"data:[^"]*"', "", text))
    assert set(re.findall(r"<(link|iframe|object|embed|base|script src)[^>]*>", text)) == {"link"}
    assert str(tmp_path.parent) not in text


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x, y):
        return self.one(x) + self.two(y)


def test_operations_are_counted_for_the_usual_inputs_if_none_were_given(tmp_path):
    model = nmgraph.convert(mlp(), method="static")
    assert "MACs are multiply-accumulate" in words(nmgraph.report(model, tmp_path / "report.html"))
    found = gather(model)
    assert found.macs == (sum(p.numel() for p in model.parameters() if p.dim() == 2), found.macs[0] / 2)
    assert found.cost.inference == 0.5


def test_a_packed_weight_without_a_backward_mask_is_planned_without_one():
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.ones(1, 8, 32)
    model = nmgraph.convert(nn.Sequential(nn.Linear(32, 32), layer), method="bimask", example_inputs=x)
    shares = gather(model).cost.layers
    assert shares["1.self_attn.in_proj_weight"].on_24.input_gradient == 1.0
    assert shares["1.linear1"].on_24.input_gradient == 0.5


def test_report_without_anything_says_what_is_missing_and_how_to_get_it(tmp_path):
    model = nmgraph.convert(TwoInputs(), method="lbc")
    said = words(nmgraph.report(model, tmp_path / "report.html"))
    assert "Training has not finished: not attached yet; 2 of 2 layers are not N:M yet." in said
    for remedy in ("--log run.jsonl", "nmgraph export MODEL.nm.pt", "Train to the end", "--input 1x3x224x224"):
        assert remedy in said
    assert "MACs are multiply-accumulate" not in said
    assert "Magnitude is" not in said


def test_report_amid_training_says_where_it_stands(tmp_path):
    model, log = trained(tmp_path, until=5)
    said = words(nmgraph.report(model, tmp_path / "report.html", log=log))
    assert "Training has not finished: step 5 of 12; 2 of 2 layers are not N:M yet." in said
    assert "unfinished" in said


def test_report_of_a_finalized_model_needs_no_masks(run, tmp_path):
    model, log, export = run
    finished = nmgraph.finalize(nmgraph.load(model))
    alone = words(nmgraph.report(finished, tmp_path / "alone.html"))
    assert "N:M holds in 2 of 2 converted layers" in alone
    assert "There are no pictures" in alone
    assert "<img alt=" not in alone
    assert "Mask of 6" in nmgraph.report(finished, tmp_path / "with.html", log=log, export=export).read_text()


def test_numbers_are_those_of_the_model_and_its_log(run):
    model, log, _ = run
    found = gather(nmgraph.load(model), log=log)
    wide = {layer.entry.name: layer for layer in found.layers}
    assert [layer.verdict for layer in found.layers] == ["dense", "holds", "holds"]
    assert wide["6"].weight_bytes == 8 * 32 * 4
    assert wide["6"].compressed_bytes == 8 * 16 * 4 + 8 * 16 * 2 // 8
    assert wide["6"].kept == 0.5
    assert wide["2"].kept_macs == wide["2"].entry.macs / 2 == 16 * 32 * 9 * 64 / 2
    summary = found.summary()
    assert summary["last_noted"]["loss"]["step"] == summary["step"] == 12
    assert 0 < summary["training_macs"]["over_dense"] < 1
    assert json.loads(json.dumps(summary)) == summary


def test_weights_that_were_changed_after_training_are_called_out(run, tmp_path):
    finished = nmgraph.finalize(nmgraph.load(run[0]))
    with torch.no_grad():
        finished[6].weight.fill_(1.0)
    page = nmgraph.report(finished, tmp_path / "report.html")
    assert "The weights do not hold: 1 of 2 weights hold" in words(page)
    assert '<p class="verdict bad">' in page.read_text()


def test_log_that_goes_on_after_the_model_was_saved_is_doubted(run, tmp_path):
    model, log = trained(tmp_path, until=5)
    doubts = gather(model, log=run[1]).doubts
    assert doubts == ["The log ends at step 12, but the model is at step 5."]
    assert gather(model, log=log).doubts == []


def test_log_or_export_of_another_model_is_refused(run, tmp_path):
    _, log, export = run
    other = nmgraph.convert(mlp(), method="lbc")
    with pytest.raises(
        FileError, match=r"run\.jsonl is the log of another model: of 6, the model has no such sparse layer\."
    ):
        nmgraph.report(other, tmp_path / "report.html", log=log)
    with pytest.raises(FileError, match=r"net-export is the export of another model: 2 is not the same in both\."):
        nmgraph.report(other, tmp_path / "report.html", export=export)
    assert not (tmp_path / "report.html").exists()


def test_log_or_export_of_another_method_or_pattern_is_refused(tmp_path):
    def made(name, method, pattern):
        model = nmgraph.convert(nn.Sequential(nn.Linear(16, 8)), method=method, pattern=pattern)
        controller = nmgraph.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4)
        nmgraph.record(controller, tmp_path / f"{name}.jsonl").close()
        return model

    model, other = made("model", "srste", "2:4"), made("other", "static", "1:4")
    said = r"other.jsonl is the log of another model: 0 is static 1:4 of \[8, 16\] there, and srste 2:4 of \[8, 16\] here\."
    with pytest.raises(FileError, match=said):
        nmgraph.report(model, tmp_path / "page.html", log=tmp_path / "other.jsonl")
    finished = nmgraph.finalize(made("third", "static", "2:4"))
    with pytest.raises(FileError, match=r"0 is static 1:4 of .* there, and static 2:4 of .* here"):
        nmgraph.report(finished, tmp_path / "page.html", log=tmp_path / "other.jsonl")
    nmgraph.export(other, tmp_path / "export", onnx=False, safetensors=True)
    with pytest.raises(FileError, match=r"is the export of another model: 0 is not the same in both"):
        nmgraph.report(model, tmp_path / "page.html", export=tmp_path / "export")


def test_hostile_names_stay_text(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(HOSTILE.replace(".", ""), nn.Linear(16, 8))

        def forward(self, x):
            return next(self.children())(x)

    model = nmgraph.convert(Net(), method="srste")
    log = tmp_path / "run.jsonl"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    telemetry = nmgraph.record(nmgraph.attach(model, optimizer, total_steps=2), log, every=1)
    model(torch.ones(1, 16)).sum().backward()
    telemetry.note(**{HOSTILE: 1.0})
    optimizer.step()
    telemetry.close()
    text = nmgraph.report(model, tmp_path / "report.html", log=log).read_text()
    assert text.count("<script") == text.count("</script>") == 1
    assert "<img src=x" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 5


def test_hostile_export_stays_text_or_is_refused(run, tmp_path):
    model, _, export = run
    report, manifest = json.loads((export / "report.json").read_text()), (export / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest)
    report["checks"][0]["found"] = report["notes"] = [HOSTILE]
    report["files"][HOSTILE] = 5
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = nmgraph.report(model, tmp_path / "report.html", export=tmp_path).read_text()
    assert text.count("<script") == 1
    for damaged in (
        "",
        "[]",
        "{}",
        "null",
        '{"checks": 3}',
        "[" * 100_000,
        json.dumps({**report, "files": {"a": "b"}}),
    ):
        (tmp_path / "report.json").write_text(damaged)
        with pytest.raises(FileError, match="Export the model again"):
            gather(nmgraph.load(model), export=tmp_path)
    with pytest.raises(FileError, match="is no export: No such file"):
        gather(nmgraph.load(model), export=tmp_path / "none")


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "record", "step": "<script>", "seconds": 1, "metrics": {}, "layers": {}}',
        '{"kind": "record", "step": 1, "seconds": 1, "metrics": {"loss": "<b>"}, "layers": {}}',
        '{"kind": "record", "step": 1, "seconds": 1, "metrics": {"loss": NaN}, "layers": {}}',
        '{"kind": "record", "step": 1, "seconds": 1, "metrics": {}, "layers": {"6": {"kept": []}}}',
        '{"kind": "record", "step": 1, "seconds": 1, "metrics": [], "layers": {}}',
        '{"kind": "picture", "step": 1, "layers": {"6": {"mask": {"shape": [9999, 9999], "bits": "AA=="}, "magnitudes": [], "kept": []}}}',
        '{"kind": "picture", "step": 1, "layers": {"6": {"mask": {"shape": [-1, -8], "bits": "AA=="}, "magnitudes": [], "kept": []}}}',
        '{"kind": "run", "format": 1, "step": 0, "total_steps": 1, "every": 1, "layers": {"6": {}}, "versions": {}}',
        "[" * 100_000,
    ],
)
def test_log_with_a_line_that_is_none_is_refused_by_its_number(run, tmp_path, line):
    lines = run[1].read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(FileError, match=r"broken\.jsonl: line 2 is no line of a training log"):
        gather(nmgraph.load(run[0]), log=broken)


def test_log_of_a_run_that_stopped_and_went_on_at_once_has_a_cost(tmp_path):
    model, log = trained(tmp_path, until=5)
    _, *later = log.read_text().splitlines()
    beginning = json.loads(log.read_text().splitlines()[0])
    stopped = json.dumps({**beginning, "step": 5})
    last = [line for line in later if json.loads(line)["kind"] == "record"][-1]
    (tmp_path / "resumed.jsonl").write_text("\n".join([stopped, last, stopped, last, ""]))
    found = gather(model, log=tmp_path / "resumed.jsonl")
    assert found.summary()["training_macs"]["over_dense"] <= 1


def test_log_of_a_part_of_the_model_is_shown_and_what_it_lacks_is_said(tmp_path):
    model = nmgraph.convert(mlp(), method="srste")
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    nmgraph.record(nmgraph.attach(model, optimizer, total_steps=4), tmp_path / "run.jsonl").close()
    page = nmgraph.report(model, tmp_path / "page.html", log=tmp_path / "run.jsonl")
    assert "The log is of a part of the model: its optimizer did not train 0, counted as dense" in words(page)


def test_model_without_values_is_refused(tmp_path):
    with torch.device("meta"):
        model = nmgraph.convert(mlp(), method="srste")
    with pytest.raises(ConversionError, match=r"is on the meta device, so there are no weights to look at\."):
        nmgraph.report(model, tmp_path / "page.html")


def test_log_that_two_runs_wrote_step_by_step_is_refused(tmp_path):
    def begun():
        model = nmgraph.convert(mlp(), method="srste")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        nmgraph.record(nmgraph.attach(model, optimizer, total_steps=4), tmp_path / "run.jsonl", every=1)
        return optimizer

    for optimizer in [begun(), begun()] * 3:
        optimizer.step()
    with pytest.raises(FileError, match=r"a record of step 1 comes after one of step 1\. Two runs wrote into one log"):
        RunLog.read(tmp_path / "run.jsonl")


def test_log_that_two_runs_wrote_is_refused(run, tmp_path):
    lines = run[1].read_text().splitlines()
    records = [line for line in lines if json.loads(line)["kind"] == "record"]
    (tmp_path / "two.jsonl").write_text("\n".join([lines[0], records[5], records[3], ""]))
    with pytest.raises(FileError, match=r"two\.jsonl: a record of step 3 comes after one of step 5\. Two runs wrote"):
        gather(nmgraph.load(run[0]), log=tmp_path / "two.jsonl")


def test_report_is_of_a_converted_model(run, tmp_path):
    with pytest.raises(ConversionError, match="Sequential is not a converted model"):
        nmgraph.report(mlp(), tmp_path / "report.html")
    with pytest.raises(FileError, match=r"model\.safetensors is what an export wrote; a report is about the converted"):
        nmgraph.report(run[2] / "model.safetensors", tmp_path / "report.html")


def test_report_without_matplotlib_says_what_to_install(run, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"need matplotlib\. pip install matplotlib\."):
        nmgraph.report(run[0], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_run_that_diverged_are_drawn(run, tmp_path):
    model, log, _ = run
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for i, line in enumerate(line for line in lines if line["kind"] == "record"):
        line["metrics"]["loss"] = (-1) ** i * 1e308
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = nmgraph.report(model, tmp_path / "report.html", log=tmp_path / "run.jsonl")
    assert "<h3>loss</h3>" in page.read_text()


def test_curves_of_long_runs_stay_small():
    from nmgraph.report.charts import draw_metric
    from nmgraph.training.run_log import Record, Run, RunLog

    def drawn(count):
        values = torch.rand(count).tolist()
        records = [Record(i, float(i), {"loss": value}, {}) for i, value in enumerate(values)]
        return draw_metric(RunLog(Run(0, count, 1, {}, {}), records), "loss", "key")

    assert len(drawn(20_000)) < 1.5 * len(drawn(400))


def test_command_writes_beside_the_model_and_keeps_what_is_there(run):
    model, log, export = run
    found = answer("report", model, "--log", log, "--export", export)
    page = model.with_name("net-report.html")
    assert found["output"] == str(page)
    assert found["verdict"] == "N:M holds in 2 of 2 converted layers, and every check of the export holds."
    assert page.read_text().startswith("<!doctype html>")
    again = call("report", model)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "net-report.html exists and is kept" in again.stderr
    assert call("report", model, "--overwrite").exit_code == 0
    assert "There is no training log" in page.read_text()


def test_nothing_on_a_page_is_none_or_nan(run, tmp_path):
    said = words(nmgraph.report(run[0], tmp_path / "report.html"))
    assert not re.search(r"\b(None|nan)\b", said)
