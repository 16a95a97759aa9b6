"""Records of a run: what they say is so, and making them changes nothing."""

import csv
import itertools
import logging

import pytest
import torch
from handles import nm
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from variants import VARIANTS

import nmgraph
from nmgraph.errors import FileError, TrainingError
from nmgraph.layers.masked import masked_weights
from nmgraph.training.run_log import BINS, HIGH, LOW, QUANTITIES, JsonLines, Picture, Record, Run, RunLog, to_line
from nmgraph.training.sinks import TensorBoard
from nmgraph.training.telemetry import take_picture


def make(method="srste", seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    return nmgraph.convert(model, method=method, **options)


def train(model, steps=20, *sinks, every=5, total_steps=20, start=0, note=True):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = nmgraph.attach(model, optimizer, total_steps=total_steps)
    telemetry = nmgraph.record(controller, *sinks, every=every) if sinks else None
    for step in range(start, start + steps):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x[:, :16]).square().mean()
        loss.backward()
        if telemetry and note:
            telemetry.note(loss=loss, rate=0.1)
        optimizer.step()
    return telemetry


def records_of(entries):
    return [e for e in entries if isinstance(e, Record)]


def test_records_come_at_the_start_every_so_many_steps_and_at_the_end():
    entries = []
    train(make(), 20, entries.append, every=8)
    assert [e.step for e in records_of(entries)] == [0, 8, 16, 20]
    assert isinstance(entries[0], Run)
    assert entries[0].layers["0"]["pattern"] == "2:4"
    assert [e.step for e in entries if isinstance(e, Picture)] == [0, 8, 16, 20]


@pytest.mark.parametrize("variant", VARIANTS)
def test_recording_changes_nothing(variant):
    method, options = VARIANTS[variant]
    one, other = make(method, **options), make(method, **options)
    train(one)
    train(other, 20, [].append, every=1)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_shares_are_those_of_the_masks():
    model, entries, masks = make("srste", pattern="1:4"), [], {}

    def keep(entry):
        if isinstance(entry, Record):
            masks[entry.step] = nm(model[0]).mask()
        entries.append(entry)

    train(model, 20, keep, every=5)
    records = records_of(entries)
    for before, after in itertools.pairwise(records):
        changed = (masks[before.step] ^ masks[after.step]).float().mean()
        assert after.layers["0"]["flipped"] == pytest.approx(float(changed), abs=1e-6)
    last, raw = records[-1].layers["0"], nm(model[0]).raw.detach().abs()
    assert records[0].layers["0"]["flipped"] == 0
    assert last["kept"] == 0.25
    assert last["magnitude"] == pytest.approx(float((raw * masks[20]).sum() / raw.sum()), rel=1e-5)
    assert max(r.layers["0"]["flipped"] for r in records) > 0


def test_lost_input_gradient_is_that_of_white_output_gradients():
    model, entries = make("bimask", pattern="1:4"), []
    train(model, 20, entries.append, every=20)
    operand = nm(model[0]).operand()
    white = torch.randn(20_000, 32)
    whole, sparse = white @ operand.forward, white @ operand.backward
    seen = (whole - sparse).square().sum() / whole.square().sum()
    said = records_of(entries)[-1].layers["0"]["input_gradient_lost"]
    assert said == pytest.approx(float(seen), rel=0.05)
    assert 0.1 < said < 0.9


def test_methods_add_their_own_gauges_and_all_quantities_are_explained():
    entries = []
    train(make("lbc"), 20, entries.append)
    lives = [r.layers["0"]["live_combinations"] for r in records_of(entries)]
    assert lives[0] == 6
    assert lives[-1] == 1
    train(make("bame", interval=2), 20, entries.append)
    train(make("bimask"), 20, entries.append)
    assert {q for r in records_of(entries) for numbers in r.layers.values() for q in numbers} == set(QUANTITIES)


def test_metrics_are_means_since_the_record_before():
    entries = []
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    telemetry = nmgraph.record(nmgraph.attach(model, optimizer, total_steps=4), entries.append, every=2)
    for value in (1.0, torch.tensor([3.0]), float("nan"), 1.0):
        telemetry.note(loss=value)
        optimizer.step()
    assert [r.metrics for r in records_of(entries)] == [{}, {"loss": 2.0}, {"loss": None}]
    with pytest.raises(TrainingError, match=r"note\(loss=...\) takes one real number, not a tensor of \[2\]"):
        telemetry.note(loss=torch.ones(2))
    for value in (None, "low", [1.0], 1j, torch.tensor(1j), 10**400):
        with pytest.raises(TrainingError, match=r"note\(loss=...\) takes one real number, not "):
            telemetry.note(loss=value)


def test_pictures_show_a_corner_of_the_mask_and_all_magnitudes():
    model, entries = make(pattern="1:4"), []
    train(model, 20, entries.append, every=20)
    layer = [e for e in entries if isinstance(e, Picture)][-1].layers["2"]
    weight = nm(model[2])
    assert torch.equal(layer.mask, weight.mask())
    assert (sum(layer.magnitudes), sum(layer.kept)) == (512, 128)
    places = ((weight.raw.detach().abs().log2() - LOW) / (HIGH - LOW) * BINS).long().clamp(0, BINS - 1)
    assert torch.equal(torch.tensor(layer.magnitudes), torch.bincount(places.flatten(), minlength=BINS))


def test_pictures_count_every_weight_of_a_large_layer():
    model = nn.utils.skip_init(nn.Linear, 4104, 4104, bias=False)
    nn.init.zeros_(model.weight)
    nmgraph.convert(model, method="srste")
    picture = take_picture(nm(model), torch.ones(4104, 4104, dtype=torch.bool))
    assert picture.magnitudes[0] == picture.kept[0] == 4104**2 > 2**24


def test_pictures_leave_out_what_is_no_number():
    model = make(pattern="1:4")
    with torch.no_grad():
        nm(model[2]).raw[0, :4] = torch.tensor([float("nan"), float("inf"), 0.0, -1.0])
    picture = take_picture(nm(model[2]), nm(model[2]).mask())
    assert (sum(picture.magnitudes), picture.magnitudes[0], picture.magnitudes[-1]) == (511, 1, 1)


def test_a_log_reads_back_as_it_was_written(tmp_path):
    entries, path = [], tmp_path / "run.jsonl"
    train(make("lbc"), 20, entries.append, path)
    log = RunLog.read(path)
    read = [to_line(e) for e in (log.run, *log.records, *log.pictures)]
    assert sorted(read) == sorted(map(to_line, entries))


def test_a_resumed_run_goes_on_in_its_log_and_what_was_done_twice_counts_once(tmp_path):
    path, checkpoint = tmp_path / "run.jsonl", tmp_path / "model.nm.pt"
    model = make("lbc")
    train(model, 10, path, every=1)
    nmgraph.save(model, checkpoint)
    train(model, 4, path, every=1, start=10)  # lost: the machine stops here
    train(nmgraph.load(checkpoint), 10, path, every=1, start=10)
    log = RunLog.read(path)
    steps = [r.step for r in log.records]
    assert steps == sorted(steps)
    assert set(steps) == set(range(21))
    assert log.run.step == 10
    train(make(), 5, path, every=1)  # another run, from its beginning
    assert [r.step for r in RunLog.read(path).records] == [0, 1, 2, 3, 4, 5]


def test_a_log_that_was_cut_off_is_read_and_gone_on_with(tmp_path, caplog):
    path = tmp_path / "run.jsonl"
    train(make(), 20, path)
    path.write_bytes(path.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING, "nmgraph"):
        assert len(RunLog.read(path).records) == 5
    assert "is not complete, and is left out" in caplog.text
    text = path.read_text()
    JsonLines(path)(RunLog.read(path).records[0])
    assert path.read_text().startswith(text + "\n")


def test_a_run_that_was_killed_while_it_wrote_goes_on_in_a_log_that_reads(tmp_path, caplog):
    path, model = tmp_path / "run.jsonl", make()
    train(model, 10, path)
    path.write_bytes(path.read_bytes()[:-40])
    train(model, 10, path, start=10)
    with caplog.at_level(logging.WARNING, "nmgraph"):
        assert [r.step for r in RunLog.read(path).records] == [0, 5, 10, 10, 15, 20]
    assert "is not complete, and is left out" in caplog.text


def test_an_editors_mark_at_the_beginning_is_no_harm(tmp_path):
    path = tmp_path / "run.jsonl"
    train(make(), 10, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(RunLog.read(path).records) == 3


def test_an_earlier_state_loaded_amid_a_run_makes_what_came_after_it_history(tmp_path):
    path, model = tmp_path / "run.jsonl", make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.record(nmgraph.attach(model, optimizer, total_steps=20), path, every=2)

    def step(count):
        for _ in range(count):
            model(torch.ones(1, 32)).sum().backward()
            optimizer.step()

    step(5)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    step(6)
    model.load_state_dict(state)
    step(15)
    log = RunLog.read(path)
    assert [r.step for r in log.records] == [0, 2, 4, *range(6, 21, 2)]
    assert log.run.step == 5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no line of a training log"),
        ('{"kind": "tune"}', "there is no kind 'tune'"),
        ('{"kind": "run", "format": 99}', "format 99 is newer than this nmgraph"),
        ("[]", "line 2 is no line of a training log"),
        (
            '{"kind": "run", "format": 1, "step": 0, "total_steps": 0, "every": 1, "layers": {}, "versions": {}}',
            "no steps",
        ),
        (
            '{"kind": "run", "format": 1, "step": 0, "total_steps": 9, "every": 1, "layers": {}, "versions": []}',
            "no names",
        ),
        ('{"kind": "record", "step": 0, "seconds": 1%s, "metrics": {}, "layers": {}}' % ("0" * 400), "too large"),
    ],
)
def test_other_lines_are_named(tmp_path, line, said):
    path = tmp_path / "run.jsonl"
    train(make(), 20, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(FileError, match=said):
        RunLog.read(path)


def test_files_that_cannot_be_logs_are_refused(tmp_path):
    controller = nmgraph.attach(model := make(), torch.optim.SGD(model.parameters(), lr=0.1), total_steps=5)
    for given, said in [
        (tmp_path / "run.txt", "a training log is a .jsonl file"),
        (3, "something callable, not to 3"),
        (tmp_path / "none" / "run.jsonl", "Make it first"),
    ]:
        with pytest.raises((TrainingError, FileError), match=said):
            nmgraph.record(controller, given)
    with pytest.raises(TrainingError, match="takes the controller that"):
        nmgraph.record(model, tmp_path / "run.jsonl")
    with pytest.raises(TrainingError, match="every=0 must be"):
        nmgraph.record(controller, every=0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(FileError, match="does not say where a run begins"):
        RunLog.read(tmp_path / "empty.jsonl")


def test_a_full_disk_does_not_end_a_run(caplog):
    def full(entry):
        raise OSError(28, "No space left on device")

    entries = []
    with caplog.at_level(logging.WARNING, "nmgraph"):
        train(make(), 20, full, entries.append)
    assert caplog.text.count("No space left on device") == 1
    assert len(records_of(entries)) == 5


def test_csv_has_a_row_for_each_number(tmp_path):
    train(make("lbc"), 20, tmp_path / "run.csv", every=10)
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "seconds", "site", "quantity", "value"]
    assert [float(r["value"]) for r in rows if (r["site"], r["quantity"]) == ("2", "kept")] == [1.0, 0.5, 0.5]
    assert {r["quantity"] for r in rows if not r["site"]} == {"loss", "rate"}


def test_names_that_no_file_can_hold_do_not_end_a_run(tmp_path):
    model = nn.Sequential()
    model._modules["half \ud800"] = nn.Linear(32, 16)
    train(nmgraph.convert(model, method="srste"), 5, tmp_path / "run.csv", tmp_path / "run.jsonl")
    assert "half \\ud800" in (tmp_path / "run.csv").read_text(encoding="utf-8")
    assert list(RunLog.read(tmp_path / "run.jsonl").run.layers) == ["half \ud800"]


def test_tensorboard_reads_what_is_sent_to_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path / "board")
    entries = []
    train(make("lbc"), 20, board, entries.append)
    board.writer.close()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert "nmgraph/kept/0" in events.Tags()["scalars"]
    seen = [(e.step, e.value) for e in events.Scalars("nmgraph/kept")]
    assert seen == [(r.step, pytest.approx(r.mean("kept"))) for r in records_of(entries)]


def test_closing_records_the_last_step_and_ends(tmp_path):
    entries = []
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    telemetry = nmgraph.record(nmgraph.attach(model, optimizer, total_steps=9), entries.append, every=5)
    for _ in range(7):
        optimizer.step()
    telemetry.close()
    optimizer.step()
    assert [r.step for r in records_of(entries)] == [0, 5, 7]


def test_another_attach_ends_it():
    entries = []
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.record(nmgraph.attach(model, optimizer, total_steps=4), entries.append, every=1)
    nmgraph.attach(model, optimizer, total_steps=4)
    optimizer.step()
    assert [r.step for r in records_of(entries)] == [0]


def test_steps_that_a_scaler_skips_are_no_steps():
    entries = []
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    nmgraph.record(nmgraph.attach(model, optimizer, total_steps=4), entries.append, every=1)
    scaler = torch.amp.GradScaler("cpu")
    for scale in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 32)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [r.step for r in records_of(entries)] == [0, 1, 2]


def ranks(rank, world, folder, method, wrap):
    model = make(method)
    entries = []
    train(wrap(model), 20, folder / "run.jsonl", entries.append)
    assert bool(entries) == (rank == 0)


def sharded(model):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, sharded])
@pytest.mark.parametrize("method", ["lbc", "bimask"])
def test_one_of_many_processes_writes_what_a_single_one_would(tmp_path, method, wrap):
    on_ranks(2, ranks, tmp_path, method, wrap)
    train(make(method), 20, tmp_path / "single.jsonl")
    many, single = (RunLog.read(tmp_path / name) for name in ("run.jsonl", "single.jsonl"))
    assert [r.step for r in many.records] == [r.step for r in single.records]
    for ours, theirs in zip(many.records, single.records, strict=True):
        assert ours.layers.keys() == theirs.layers.keys()
        for name, numbers in theirs.layers.items():
            assert ours.layers[name] == pytest.approx(numbers, abs=2e-3)


def test_nothing_keeps_the_model_alive():
    import gc
    import weakref

    model = make()
    train(model, 2, [].append)
    seen = weakref.ref(model)
    assert masked_weights(model)
    del model
    gc.collect()
    assert seen() is None
