"""Averages of a model in training, as torch, timm and YOLO-like trainers make them: N:M once finalized."""

import copy
import functools
import logging

import pytest
import torch
from handles import nm
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from variants import VARIANTS

import nmgraph
from nmgraph.errors import ConversionError, UnfinishedError
from nmgraph.integrations.averages import take_masks
from nmgraph.layers.masked import buffer_names, masked_weights

STEPS = 16
FOLLOWING = {
    "torch": AveragedModel,
    "timm v3": lambda m: ModelEmaV3(m, decay=0.9),
    "timm v3, one by one": lambda m: ModelEmaV3(m, decay=0.9, foreach=False),
    "timm v3, without buffers": lambda m: ModelEmaV3(m, decay=0.9, exclude_buffers=True),
}
BLENDING = {
    "torch, with buffers": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "timm v2": lambda m: ModelEmaV2(m, decay=0.9),
    "timm v2, which leaves the recipe whole": lambda m: ModelEmaV2(m, decay=0.99),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def network(method, **options):
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8))
    return nmgraph.convert(net, method=method, **options)


def trained(model, after_step=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x = torch.randn(16, 8, 4, 4, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x.flatten(1).argmax(1) % 8).backward()
        optimizer.step()
        after_step()
    return model


@functools.cache
def averages_of(variant):
    """Train a model beside an average of each kind, begun before training."""
    method, options = VARIANTS[variant]
    model = network(method, **options)
    averages = {name: make(model) for name, make in (FOLLOWING | BLENDING).items()}

    def update():
        for average in averages.values():
            (average.update_parameters if isinstance(average, AveragedModel) else average.update)(model)

    return trained(model, update), averages


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def assert_masks_are_those_of(model, average):
    for name, weight in masked_weights(model).items():
        own = masked_weights(average.module)[name]
        for buffer in buffer_names(weight.key, weight.told):
            assert torch.equal(own.layer._buffers[buffer], weight.layer._buffers[buffer]), (name, buffer)


@variants
@pytest.mark.parametrize("kind", FOLLOWING)
def test_an_average_that_copies_buffers_is_at_its_pattern(variant, kind, caplog):
    _, averages = averages_of(variant)
    finished = nmgraph.finalize(averages[kind])
    assert type(finished) is nn.Sequential
    assert nmgraph.verify(finished).holds
    assert warnings_of(caplog) == []


@variants
@pytest.mark.parametrize("kind", BLENDING)
def test_an_average_that_blends_buffers_is_given_masks_anew_and_says_so(variant, kind, caplog):
    model, averages = averages_of(variant)
    sparse = masked_weights(averages[kind].module)
    finished = nmgraph.finalize(averages[kind])
    assert nmgraph.verify(finished).holds
    if not warnings_of(caplog):  # then no mask had moved
        for name, weight in masked_weights(model).items():
            state = sparse[name].state._asdict()
            assert all(torch.equal(state[k], t) for k, t in weight.state._asdict().items() if t.dtype == torch.bool)
    for name, weight in sparse.items():
        kept = finished.get_submodule(name).weight.abs().sum() / weight.raw.abs().sum()
        assert kept > 0.4  # half of all weights are, and not the smaller half


@variants
@pytest.mark.parametrize("kind", BLENDING)
def test_a_blended_average_takes_the_masks_of_its_model(variant, kind, caplog):
    model, averages = averages_of(variant)
    average = copy.deepcopy(averages[kind])
    take_masks(average, model)
    assert_masks_are_those_of(model, average)
    for name, weight in masked_weights(averages[kind].module).items():
        assert torch.equal(masked_weights(average.module)[name].raw, weight.raw)
    assert nmgraph.verify(nmgraph.finalize(average)).holds
    assert warnings_of(caplog) == []


def test_a_blended_average_is_exported(tmp_path):
    _, averages = averages_of("lbc")
    blended = averages["timm v2, which leaves the recipe whole"]
    assert nmgraph.export(blended, tmp_path / "export", onnx=False, safetensors=True).holds


def test_masks_chosen_anew_are_reported_with_the_magnitude_they_keep(caplog):
    net = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False))
    model = nmgraph.convert(net, method="gradual")
    average = ModelEmaV2(model, decay=0.9)
    average.update(model)
    with torch.no_grad():
        nm(average.module[0]).raw.copy_(torch.tensor([[5.0, 1.0, -3.0, 1.0]]))
        nm(average.module[1]).raw.copy_(torch.tensor([[1.0, 1.0, -1.0, 1.0]]))
    nmgraph.finalize(average)
    assert warnings_of(caplog) == [
        "2 layers (0, ...): an average has blended their nm_ buffers, so their masks were chosen anew; all masks keep 71.4% "
        "of the weights' magnitude; least in 1, 50.0%. The average of a trained model takes that model's masks first: "
        "nmgraph.integrations.averages.take_masks(average, model)."
    ]


def test_what_the_masks_of_an_average_keep_can_be_read(caplog):
    caplog.set_level(logging.INFO, "nmgraph")
    average = AveragedModel(nmgraph.convert(nn.Sequential(nn.Linear(4, 1, bias=False)), method="srste"))
    with torch.no_grad():
        nm(average.module[0]).raw.copy_(torch.tensor([[5.0, 1.0, -3.0, 1.0]]))
    nmgraph.finalize(average)
    assert caplog.messages == ["the masks keep 80.0% of the weights' magnitude; least in 0, 80.0%"]


@pytest.mark.parametrize("variant", ["lbc", "rigl", "srste"])
@pytest.mark.parametrize("kind", ["timm v2", "timm v2, which leaves the recipe whole"])
def test_a_blended_average_out_of_its_wrapper_is_never_more_than_n_of_m(variant, kind):
    _, averages = averages_of(variant)
    try:
        finished = nmgraph.finalize(averages[kind].module, force=True)
    except UnfinishedError:
        return
    assert nmgraph.verify(finished).holds


def test_a_half_trained_average_is_refused():
    model = network("lbc")
    average = AveragedModel(model)
    average.update_parameters(model)
    with pytest.raises(UnfinishedError, match="it was never trained with attach"):
        nmgraph.finalize(average)


def test_masks_are_taken_from_a_model_that_is_sparse_in_the_same_way_only():
    with pytest.raises(ConversionError) as caught:
        take_masks(AveragedModel(network("lbc")), network("lbc", pattern="1:4"))
    assert str(caught.value) == (
        "0 is not sparse in the same way in the average and in the model. Make the average from the converted model."
    )
    with pytest.raises(ConversionError, match=r"^Linear is not sparse in the same way"):
        take_masks(nn.Linear(4, 4), nn.Linear(4, 4))


def test_a_blended_average_is_saved_once_it_has_taken_the_masks(tmp_path):
    model, averages = averages_of("lbc")
    average = copy.deepcopy(averages["timm v2"])
    with pytest.raises(ConversionError) as caught:
        nmgraph.save(average, tmp_path / "average.nm.pt")
    assert str(caught.value) == (
        "0: an average has blended its nm_ buffers. The average of a trained model takes that model's masks first: "
        "nmgraph.integrations.averages.take_masks(average, model)."
    )
    assert list(tmp_path.iterdir()) == []
    take_masks(average, model)
    nmgraph.save(average, tmp_path / "average.nm.pt")
    assert nmgraph.verify(nmgraph.finalize(nmgraph.load(tmp_path / "average.nm.pt"))).holds


def test_what_only_holds_an_average_is_refused_with_where_it_is():
    with pytest.raises(ConversionError) as caught:
        nmgraph.finalize(ModelEma(network("srste")))
    assert str(caught.value) == "a ModelEma can't be finalized; it holds the model: give its .ema."
