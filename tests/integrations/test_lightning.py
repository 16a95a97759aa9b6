"""Lightning's Trainer drives the methods, and its own checkpoints resume them."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, WeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from variants import IN_SHORT

import nmgraph
from nmgraph.errors import TrainingError
from nmgraph.integrations.lightning import SparseTraining
from nmgraph.methods import METHODS
from nmgraph.report.findings import gather
from nmgraph.training.run_log import RunLog

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


class Classifier(pl.LightningModule):
    def __init__(self, method="lbc", **options):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8))
        if method:
            nmgraph.convert(self.net, method=method, **IN_SHORT.get(method, {}), **options)

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def batches(size=8):
    x = torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.flatten(1).argmax(1) % 8), batch_size=size)


def trainer_of(*callbacks, **options):
    usual = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **{**usual, **options})


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_records_are_made_and_the_report_of_the_network_takes_them(tmp_path):
    module, sparse = Classifier("lbc"), SparseTraining(tmp_path / "run.jsonl", every=4)
    trainer_of(sparse).fit(module, batches())
    records = RunLog.read(tmp_path / "run.jsonl").records
    assert [r.step for r in records] == [0, 4, 8, 12, 16]
    assert all(0 < r.metrics["loss"] < 3 for r in records[1:])
    found = gather(module.net, log=tmp_path / "run.jsonl")
    assert list(found.log.records[-1].layers) == [e.name for e in found.manifest.converted]
    assert found.doubts == []


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_plain_loop_and_resumes_from_lightnings_checkpoint(method, tmp_path):
    whole, sparse = Classifier(method), SparseTraining()
    trainer_of(sparse).fit(whole, batches())
    assert (sparse.controller.step, sparse.controller.total_steps) == (16, 16)
    assert nmgraph.verify(nmgraph.finalize(whole.net)).holds

    plain = Classifier(method)
    optimizer = plain.configure_optimizers()
    nmgraph.attach(plain, optimizer, total_steps=16)
    for _ in range(2):
        for batch in batches():
            optimizer.zero_grad()
            plain.training_step(batch).backward()
            optimizer.step()
    assert same(whole, plain)

    half = trainer_of(SparseTraining(), pl.callbacks.LambdaCallback(on_train_epoch_end=stop))
    half.fit(Classifier(method), batches())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Classifier(method)
    trainer_of(SparseTraining()).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert same(resumed, whole)


def stop(trainer, module):
    trainer.should_stop = True


def test_accumulated_batches_are_one_step_of_the_schedule():
    module, sparse = Classifier(), SparseTraining()
    trainer_of(sparse, accumulate_grad_batches=2).fit(module, batches())
    assert (sparse.controller.step, sparse.controller.total_steps) == (8, 8)
    assert nmgraph.verify(nmgraph.finalize(module.net)).holds


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"max_steps": 12}])
def test_precision_clipping_and_a_count_of_steps_end_at_the_pattern(options):
    module, sparse = Classifier(), SparseTraining()
    trainer_of(sparse, **options).fit(module, batches())
    assert sparse.controller.step == sparse.controller.total_steps == options.get("max_steps", 16)
    assert nmgraph.verify(nmgraph.finalize(module.net)).holds


def test_lightnings_average_leaves_buffers_alone_and_ends_at_the_pattern(caplog):
    module = Classifier()
    module.validation_step = lambda batch: None  # before which the average takes the module's place, and gives it back
    trainer = trainer_of(SparseTraining(), EMAWeightAveraging(decay=0.9, use_buffers=False))
    trainer.fit(module, batches(), batches())
    assert nmgraph.verify(nmgraph.finalize(module.net)).holds
    assert not [record for record in caplog.records if record.name == "nmgraph"]


@pytest.mark.parametrize("average", [WeightAveraging, EMAWeightAveraging])
def test_an_average_that_blends_buffers_is_refused_before_training(average):
    with pytest.raises(TrainingError) as caught:
        trainer_of(SparseTraining(), average()).fit(Classifier(), batches())
    assert str(caught.value) == (
        f"{average.__name__} averages buffers, masks and counters included, and writes them over the module in the end. "
        "Give it use_buffers=False: it copies them then."
    )


class Manual(Classifier):
    automatic_optimization = False


class TwoOptimizers(Classifier):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[4])]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(batches().dataset)


def refusal(module, loader=None, *callbacks, **options):
    with pytest.raises(TrainingError) as caught:
        trainer_of(SparseTraining(), *callbacks, **options).fit(module, batches() if loader is None else loader)
    return str(caught.value)


def test_a_module_that_was_not_converted_is_refused():
    assert refusal(Classifier(None)) == (
        "Classifier has no sparse layer. Convert it first: nmgraph.convert(model, method=...)."
    )


@pytest.mark.parametrize(
    ("module", "callbacks", "what"),
    [
        (Manual, [], "Manual takes its steps by hand"),
        (TwoOptimizers, [], "TwoOptimizers has 2 optimizers"),
        (
            Classifier,
            [GradientAccumulationScheduler({0: 4, 1: 1})],
            "GradientAccumulationScheduler changes how many batches make a step",
        ),
    ],
)
def test_steps_that_lightning_does_not_count_are_refused(module, callbacks, what):
    module = module()
    module.automatic_optimization = bool(callbacks)
    assert refusal(module, None, *callbacks) == (
        f"{what}, so SparseTraining can't tell which steps count. Leave it out, and attach in the module's "
        "on_train_start: nmgraph.attach(self, optimizer, total_steps=...)."
    )


@pytest.mark.parametrize(
    ("loader", "options", "steps"),
    [(None, {"max_epochs": -1}, "inf"), (DataLoader(Endless(), batch_size=8), {"max_epochs": 2}, "-1")],
    ids=["no end", "no length"],
)
def test_training_without_a_known_end_is_refused(loader, options, steps):
    assert refusal(Classifier(), loader, **options) == (
        f"the Trainer can't tell how many optimizer steps it will take ({steps}), and schedules are fractions of a whole "
        "run. Give it an end: Trainer(max_steps=...), or max_epochs=... if the data has a length."
    )


def test_the_method_sees_the_gradient_before_it_is_clipped():
    options = {"decay": 10.0}  # so large that it has to be clipped, too
    clipped, plain = Classifier("srste", **options), Classifier("srste", **options)
    trainer_of(SparseTraining(), gradient_clip_val=0.1).fit(clipped, batches())
    optimizer = plain.configure_optimizers()
    controller = nmgraph.attach(plain, optimizer, total_steps=16)
    for _ in range(2):
        for batch in batches():
            optimizer.zero_grad()
            plain.training_step(batch).backward()
            controller.update()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
    assert same(clipped, plain)
