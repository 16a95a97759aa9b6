"""Blocks along the kernel window, as published code has them: trained, finalized, written and checked as such."""

import pytest
import torch
from handles import nm
from models import resnet
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError
from nmgraph.methods import METHODS
from nmgraph.nm.grouping import FLAT, blocks, canonical


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 4))


def trained(method="srste", pattern="2:4", **options):
    model = nmgraph.convert(net(), method=method, pattern=pattern, block_axis="flat", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=6)
    for step in range(6):
        x = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def along_channels(weight):
    return bool((blocks(canonical(weight != 0), 4).sum(-1) <= 2).all())


@pytest.mark.parametrize("method", METHODS)
def test_blocks_run_along_the_kernel_and_then_over_channels(method):
    options = {"interval": 2} if "interval" in METHODS[method]().options() else {}
    weight = nmgraph.finalize(trained(method, **options))[0].weight.detach()
    flat = (weight != 0).flatten(1).reshape(8, 9, 4)  # 36 weights of a filter, in memory order
    assert (flat.sum(-1) <= 2).all()
    assert not along_channels(weight)


def test_a_kernel_of_one_and_a_linear_layer_are_what_they_are_along_channels():
    flat = trained()
    plain = nmgraph.convert(net(), method="srste")
    for layer in (2, 4):
        assert nm(flat[layer]).told == nm(plain[layer]).told
    assert nm(flat[0]).told.reduction_axis == FLAT


def test_the_manifest_and_its_table_say_so(capsys):
    manifest = nmgraph.manifest(trained())
    assert manifest.axes == {"0": FLAT, "2": 1, "4": 1}
    from rich.console import Console

    Console(width=160).print(manifest)
    shown = capsys.readouterr().out
    assert shown.count("flat blocks: not for TensorRT") == 1


def test_verify_holds_it_to_its_own_axis_and_says_that_tensorrt_cannot_use_it():
    found = nmgraph.verify(nmgraph.finalize(trained()))
    assert found.holds
    assert [bool(c.tensorrt) for c in found.checks] == [True, False, False]
    assert found.checks[0].tensorrt == "more than 2 of 4 are non-zero"


def test_saved_and_loaded_it_goes_on_as_before(tmp_path):
    model = trained()
    nmgraph.save(model, tmp_path / "m.nm.pt")
    loaded = nmgraph.load(tmp_path / "m.nm.pt")
    assert nm(loaded[0]).told == nm(model[0]).told
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(loaded(x), model(x))


def test_the_written_files_are_proved_along_the_kernel(tmp_path):
    report = nmgraph.export(trained(), tmp_path / "out", example_inputs=torch.randn(2, 4, 4, 4), safetensors=True)
    assert report.holds
    for name in ("model.onnx", "model.safetensors"):
        found = nmgraph.verify(tmp_path / "out" / name)
        assert found.holds
        assert sum(not c.tensorrt for c in found.checks) == 2


def test_one_weight_too_many_is_found(tmp_path):
    finished = nmgraph.finalize(trained())
    with torch.no_grad():
        finished[0].weight[3].fill_(1.0)
    assert [c.name for c in nmgraph.verify(finished).failures] == ["0"]


def test_a_filter_that_does_not_divide_stays_dense_with_the_count():
    manifest = nmgraph.manifest(nmgraph.convert(net(), method="srste", pattern="1:16", block_axis="flat"))
    assert manifest.skipped[0].reason == "36 flat weights are not a multiple of 16"


def test_a_checkpoint_along_channels_is_refused_by_name():
    state = nmgraph.convert(net(), method="srste").state_dict()
    model = nmgraph.convert(net(), method="srste", block_axis="flat")
    with pytest.raises(
        RuntimeError,
        match=r"0 was trained as srste 2:4, but this model is converted as srste 2:4 \(blocks run flat\)",
    ):
        model.load_state_dict(state)


def test_another_axis_is_refused():
    with pytest.raises(ConversionError, match=r"^there is no block axis 'rows'\. Use channels, or flat\.$"):
        nmgraph.convert(net(), block_axis="rows")


def test_channels_last_weights_are_blocked_as_contiguous_ones_are():
    plain, last = resnet(), resnet()
    last.load_state_dict(plain.state_dict())
    last = last.to(memory_format=torch.channels_last)
    for model in (plain, last):
        nmgraph.convert(model, method="srste", block_axis="flat")
    x = torch.randn(1, 3, 32, 32)
    assert torch.allclose(plain.eval()(x), last.eval()(x), atol=1e-5)
    assert torch.equal(plain.layer2[0].conv1.weight, last.layer2[0].conv1.weight)
    assert last.layer2[0].conv1.weight.stride() == nm(last.layer2[0].conv1).raw.stride()
