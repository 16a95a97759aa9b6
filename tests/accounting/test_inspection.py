"""What `inspect` shows before anything is changed."""

import io
import logging
import time

import pytest
import torch
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError
from nmgraph.layers.masked import masked_weights
from nmgraph.methods import METHODS
from nmgraph.nm.grouping import canonical
from nmgraph.nm.masks import magnitude_mask


def resnet18():
    from torchvision.models import resnet18

    return resnet18(weights=None)


def test_it_says_what_convert_then_does():
    model = resnet18()
    settings = {"method": "bimask", "pattern": "1:4", "layers": {"layer4.*": "2:4"}, "skip": ["fc"]}
    inputs = torch.zeros(1, 3, 64, 64)
    found = nmgraph.inspect(model, **settings, example_inputs=inputs)
    nmgraph.convert(model, **settings, example_inputs=inputs)
    done = nmgraph.manifest(model)
    assert found.manifest.entries == done.entries
    for name, weight in masked_weights(model).items():
        w_OSC = canonical(weight.raw.detach(), weight.told.reduction_axis)
        kept = (w_OSC.abs() * magnitude_mask(w_OSC, weight.told.pattern)).sum() / w_OSC.abs().sum()
        assert found.kept[name] == pytest.approx(float(kept), rel=1e-5)
    state = sum(t.numel() * t.element_size() for w in masked_weights(model).values() for t in w.state)
    assert {t.name: t.state for t in found.methods}["bimask"] == state


def test_it_leaves_the_model_as_it_is():
    model = resnet18()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    nmgraph.inspect(model)
    assert type(model).__name__ == "ResNet"
    assert not masked_weights(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_every_method_has_its_totals_or_says_why_not():
    found = nmgraph.inspect(nn.Linear(64, 64), method="srste", pattern="16:32", example_inputs=torch.ones(1, 64))
    totals = {t.name: t for t in found.methods}
    assert list(totals) == list(METHODS)
    assert "lbc keeps track of every combination" in totals["lbc"].refusal
    assert totals["lbc"].training is None
    assert totals["bimask"].training == pytest.approx(0.75)  # one layer, whose input needs no gradient: (d + 1) / 2
    assert totals["bimask"].training_on_24 == 1.0
    assert totals["bimask"].published == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("layer", "pattern", "expected"),
    [
        (nn.Linear(512, 512), "2:4", "likely"),
        (nn.Linear(512, 512), "1:16", "likely"),
        (nn.Linear(512, 512), "4:8", "no"),
        (nn.Linear(128, 512), "2:4", "unlikely"),
        (nn.Conv2d(64, 128, 3), "2:4", "perhaps"),
        (nn.Conv2d(64, 64, 1), "2:4", "unlikely"),
        (nn.Conv2d(512, 512, 3, groups=2), "2:4", "no"),
        (nn.ConvTranspose2d(512, 256, 3), "2:4", "likely"),
    ],
)
def test_wins_of_sparse_kernels_are_guessed_by_published_rules(layer, pattern, expected):
    found = nmgraph.inspect(nn.Sequential(layer), pattern=pattern, include=["*"])
    assert found.likely == {"0": expected}


def test_without_inputs_operations_are_left_out_and_the_table_says_how_to_have_them():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, one, two):
            return self.fc(one) + two

    from rich.console import Console

    found = nmgraph.inspect(Odd())
    assert found.inference is None
    assert {t.training for t in found.methods} == {None}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    assert "give --input" in text
    assert "MACs  " not in text.split("What the methods cost")[0]


def test_wrong_inputs_and_converted_models_are_refused():
    with pytest.raises(nmgraph.NMGraphError, match="does not take the inputs"):
        nmgraph.inspect(nn.Linear(8, 8), example_inputs=torch.ones(1, 9))
    with pytest.raises(ConversionError, match="is converted already"):
        nmgraph.inspect(nmgraph.convert(nn.Linear(8, 8)))


def test_half_precision_and_meta_weights_are_looked_at():
    assert nmgraph.inspect(nn.Linear(64, 64).bfloat16()).kept[""] == pytest.approx(0.70, abs=0.02)  # uniform
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(64, 64))
    found = nmgraph.inspect(meta)
    assert found.kept == {}
    assert found.inference == 0.5


@pytest.mark.slow
def test_large_models_take_seconds():
    from torchvision.models import resnet50
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
    assert sum(p.numel() for p in llama.parameters()) > 1e9
    for model, limit in ((resnet50(weights=None), 3.0), (llama, 20.0)):
        begun = time.process_time()
        found = nmgraph.inspect(model)
        assert time.process_time() - begun < limit
        assert found.inference < 0.55


def test_an_empty_batch_takes_no_operations_to_leave_out(tmp_path):
    empty = torch.ones(0, 64)
    found = nmgraph.inspect(nn.Linear(64, 64), example_inputs=empty)
    assert (found.inference, {total.training for total in found.methods}) == (1.0, {1.0})
    nmgraph.report(nmgraph.convert(nn.Linear(64, 64), example_inputs=empty), tmp_path / "page.html")


def test_weights_that_convert_refuses_are_refused_alike():
    model = nn.Linear(64, 64)
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(ConversionError, match=r"4096 of 4096 weights are NaN or infinite"):
        nmgraph.inspect(model)


def test_guesses_that_fail_on_a_model_without_values_are_not_logged():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Flatten(), nn.Linear(64, 64))
    log, said = logging.getLogger("torch._subclasses.fake_tensor"), io.StringIO()
    handler = logging.StreamHandler(said)
    log.addHandler(handler)
    try:
        assert nmgraph.inspect(model).inference is None
    finally:
        log.removeHandler(handler)
    assert said.getvalue() == ""
