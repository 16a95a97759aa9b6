"""What a page says about memory holds for large models, which have no values here."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nmgraph
from nmgraph.layers.masked import masked_weights

PAGE = (Path(nmgraph.__file__).parents[1] / "docs" / "scale.md").read_text()
SIZES = {
    "7 B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70 B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip


def bytes_of(size, method):
    """Count weights and the bytes of state: of a model of one layer and of two, as all layers are alike."""
    found = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SIZES[size] | {"num_hidden_layers": layers}))
        weights = masked_weights(nmgraph.convert(model, method=method)).values()
        sizes = [(w.raw.numel(), sum(t.numel() * t.element_size() for t in w.state)) for w in weights]
        found.append([sum(column) for column in zip(*sizes, strict=True)])
    more = SIZES[size]["num_hidden_layers"] - 1
    return [one + more * (two - one) for one, two in zip(*found, strict=True)]


METHODS = ["lbc", "srste", "asp", "gradual", "sste", "maxq", "decaying-mask"]


@pytest.mark.parametrize("method", [*METHODS, *(pytest.param(m, marks=pytest.mark.slow) for m in ("bimask", "bame"))])
def test_the_page_on_scale_says_how_large_the_state_is(method):
    (weights, small), (many, large) = (bytes_of(size, method) for size in SIZES)
    assert (f"{weights / 1e9:.1f}", f"{many / 1e9:.1f}") == ("6.6", "68.7")
    each = large / 64 if large > many / 2 else large  # permutations are not sharded
    row = f"| {small / weights:.2f} | {small / 1e9:.1f} GB | {large / 1e9:.1f} GB | {each / 1e9:.1f} GB |"
    line = next(line for line in PAGE.splitlines() if line.startswith("|") and method in line and " GB |" in line)
    assert line.endswith(row)


@pytest.mark.parametrize("method", ["static", "rigl", "tmask"])
def test_methods_that_draw_or_search_for_minutes_keep_as_much_for_a_weight_of_a_small_model(method):
    model = nmgraph.convert(torch.nn.Sequential(torch.nn.Linear(256, 256)), method=method)
    (weight,) = masked_weights(model).values()
    each = sum(t.numel() * t.element_size() for t in weight.state) / weight.raw.numel()
    line = next(line for line in PAGE.splitlines() if line.startswith("|") and method in line and " GB |" in line)
    assert f"| {each:.2f} |" in line


def test_a_large_model_converts_without_memory():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SIZES["70 B"]))
    nmgraph.convert(model, method="lbc")
    assert all(t.is_meta for weight in masked_weights(model).values() for t in weight.state)
