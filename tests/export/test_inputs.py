"""Example inputs: written as text, remembered from the conversion, or guessed and tried."""

import pytest
import timm
import torch
from models import TiedLanguageModel, cnn, deit, mlp
from torch import nn

import nmgraph
from nmgraph.errors import ExportError
from nmgraph.export.inputs import find_inputs, make_inputs, parse_inputs
from nmgraph.passes.manifest import find_manifest


def found(model):
    model.eval()
    return find_inputs(model, find_manifest(model))


@pytest.mark.parametrize(
    ("texts", "args", "kwargs"),
    [
        (["1x3x8x8"], [((1, 3, 8, 8), torch.float32)], {}),
        (["7"], [((7,), torch.float32)], {}),
        (["2x16:float16", "2x4:int64"], [((2, 16), torch.float16), ((2, 4), torch.int64)], {}),
        (
            ["ids=1x16:int64", "mask=1x16:bool"],
            [],
            {"ids": ((1, 16), torch.int64), "mask": ((1, 16), torch.bool)},
        ),
        (["1x8", "scale=1:bfloat16"], [((1, 8), torch.float32)], {"scale": ((1,), torch.bfloat16)}),
    ],
)
def test_shapes_are_read_from_text(texts, args, kwargs):
    inputs = parse_inputs(texts)
    assert [(tuple(t.shape), t.dtype) for t in inputs.args] == args
    assert {name: (tuple(t.shape), t.dtype) for name, t in inputs.kwargs.items()} == kwargs


@pytest.mark.parametrize(
    "text", ["", "x", "1x", "1x3x", "1,3", "-1x3", "1x3:float8", "1x3:", "=1x3", "a b=1x3", "1 x 3"]
)
def test_text_of_another_form_is_refused(text):
    with pytest.raises(ExportError) as caught:
        parse_inputs([text])
    assert str(caught.value) == (
        f"{text!r} is no input. Write [NAME=]SHAPE[:DTYPE], for example 1x3x224x224 or input_ids=1x16:int64; "
        "dtypes are float32, float16, bfloat16, float64, int64, int32, bool."
    )


def test_made_up_values_are_the_same_every_time():
    (one,), (other,) = parse_inputs(["4x4"]).args, parse_inputs(["4x4"]).args
    assert torch.equal(one, other)
    assert one.std() > 0.5


def test_made_up_integers_are_small_and_made_up_flags_are_both():
    inputs = parse_inputs(["100:int64", "100:bool"])
    assert inputs.args[0].min() >= 0
    assert inputs.args[0].max() < 100
    assert inputs.args[1].unique().tolist() == [False, True]


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (torch.zeros(2, 3), 1, []),
        ((torch.zeros(2), torch.zeros(3)), 2, []),
        ([torch.zeros(2)], 1, []),
        ({"x": torch.zeros(2), "y": torch.zeros(3)}, 0, ["x", "y"]),
    ],
)
def test_tensors_tuples_and_dicts_are_taken(given, args, kwargs):
    inputs = make_inputs(given)
    assert (len(inputs.args), list(inputs.kwargs)) == (args, kwargs)
    assert make_inputs(inputs) is inputs


def test_inputs_spell_their_shapes_and_source():
    assert str(make_inputs((torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)))) == "2x3, 4:int64 (given)"
    assert str(parse_inputs(["1x8", "mask=1x8:bool"])) == "1x8, mask=1x8:bool (values made up)"


def test_inputs_of_the_conversion_are_remembered():
    tokens = torch.randint(24, (2, 5))
    model = nmgraph.convert(TiedLanguageModel(), method="srste", example_inputs={"tokens": tokens})
    model.embedding = nn.Embedding(128, 16)  # the values are made up, below 100
    inputs = found(model)
    assert str(inputs) == "tokens=2x5:int64 (as at conversion)"


def test_remembered_inputs_survive_the_file(tmp_path):
    model = nmgraph.convert(cnn(), method="srste", example_inputs=torch.randn(3, 3, 12, 12))
    nmgraph.save(model, tmp_path / "model.nm.pt")
    assert str(found(nmgraph.load(tmp_path / "model.nm.pt"))) == "3x3x12x12 (as at conversion)"


def test_default_configuration_of_timm_is_used():
    model = timm.create_model("mobilenetv3_small_050")
    model.default_cfg = model.default_cfg | {"input_size": (3, 64, 64)}
    assert str(found(model)) == "1x3x64x64 (the model's default_cfg)"


@pytest.mark.parametrize(
    ("make", "shape"),
    [(mlp, "1x16"), (cnn, "1x3x224x224"), (deit, "1x3x32x32")],
    ids=["linear", "images", "small images"],
)
def test_usual_inputs_of_the_first_layer_are_tried(make, shape):
    assert str(found(make())) == f"{shape} (guessed from the first layer)"


def test_inputs_that_cannot_be_guessed_are_asked_for():
    model = nmgraph.convert(TiedLanguageModel())
    with pytest.raises(ExportError) as caught:
        found(model)
    first, tried = str(caught.value).splitlines()
    assert first == (
        "TiedLanguageModel needs example inputs. Give their shapes, for example --input 1x3x224x224 "
        "(in Python example_inputs=torch.randn(1, 3, 224, 224))."
    )
    assert tried.startswith("  TiedLanguageModel does not take the inputs 1x16 (guessed from the first layer): ")


def test_finding_inputs_leaves_the_model_as_it_was():
    model = cnn()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_inputs_are_given_the_precision_of_the_export_but_integers_stay():
    inputs = parse_inputs(["1x8", "1x4:int64"]).on_cpu(torch.float16)
    assert [t.dtype for t in inputs.args] == [torch.float16, torch.int64]


def test_error_of_the_model_is_told_in_one_line():
    class Picky(nn.Module):
        def forward(self, x):
            raise ValueError("first line\nsecond line")

    with pytest.raises(ExportError) as caught:
        make_inputs(torch.zeros(2, 3)).call(Picky())
    assert str(caught.value) == "Picky does not take the inputs 2x3 (given): first line"
