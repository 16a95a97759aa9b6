"""What a user gets wrong: one clear message, and a model that is as it was."""

import threading

import pytest
import torch
from models import Encoder, mlp, resnet
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError, ExportError, MethodError, PatternError


def message(error, model, **options):
    with pytest.raises(error) as caught:
        nmgraph.convert(model, **options)
    return str(caught.value)


def poisoned(value):
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 5:7] = value
    return model


@pytest.mark.parametrize("option", ["skip", "layers"])
def test_glob_that_matches_nothing_names_the_nearest_layers(option):
    value = {"skip": ["layer1.0.conv9"], "layers": {"layer1.0.conv9": "1:4"}}[option]
    assert message(ConversionError, resnet(), **{option: value}) == (
        "no layer is named 'layer1.0.conv9'. Near: layer1.0.conv2, layer1.0.conv1, layer4.0.conv2"
    )


def test_prefix_without_a_star_is_told_to_add_one():
    assert message(ConversionError, resnet(), skip=["layer1"]) == (
        "no layer is named 'layer1'. To name all in it, write layer1.*"
    )


def test_glob_that_resembles_nothing_names_some_layers():
    assert message(ConversionError, mlp(), skip=["zzz*"]) == "no layer is named 'zzz*'. Near: 0, 2"


def test_pattern_that_divides_no_layer_lists_them_with_what_would_fit():
    model = nn.Sequential(nn.Linear(18, 20), nn.ReLU(), nn.Linear(20, 9), nn.Linear(9, 2))
    assert message(PatternError, model, pattern="4:8") == (
        "the pattern 4:8 divides no layer of Sequential:\n"
        "  0: 18 input channels (fits 1:2)\n"
        "  2: 20 input channels (fits 2:4, 1:2, 1:4)\n"
        "  3: 9 input channels (fits no usual pattern)\n"
        "Choose a pattern that fits with --pattern."
    )


def test_long_list_of_layers_that_do_not_fit_is_cut():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(10)))
    text = message(PatternError, model)
    assert text.startswith("the pattern 2:4 divides no layer of Sequential:\n  0: 6 input channels (fits 1:2)\n  1: 6")
    assert text.endswith("\n  7: 6 input channels (fits 1:2)\n  and 2 more\nChoose a pattern that fits with --pattern.")


def test_layer_named_explicitly_has_to_fit():
    model = nn.Sequential(nn.Linear(18, 8), nn.Linear(8, 8))
    assert message(PatternError, model, layers={"0": "2:4"}) == (
        "0: 18 input features are not a multiple of 4, so it can't become 2:4. Choose 1:2 for it, "
        "or leave it dense with --skip 0."
    )


def test_layer_named_explicitly_has_to_be_convertible():
    model = nn.Sequential(nn.Linear(16, 16), nn.Bilinear(16, 16, 8))
    assert message(PatternError, model, layers={"1": "2:4"}) == (
        "1: Bilinear sums over two inputs at once, so it can't become 2:4. It stays dense, "
        "or leave it dense with --skip 1."
    )


def test_layer_named_explicitly_that_no_pattern_fits_is_told_to_stay_dense():
    assert message(PatternError, resnet(), layers={"conv1": "2:4"}) == (
        "conv1: 3 input channels are not a multiple of 4, so it can't become 2:4. Leave it dense with --skip conv1."
    )


@pytest.mark.parametrize("model", [nn.Embedding(8, 8), nn.Sequential(nn.ReLU()), nn.Sequential()])
def test_model_without_any_layer_to_convert(model):
    assert message(ConversionError, model) == (
        f"{type(model).__name__} has no weight that multiplies its input, so there is nothing to make sparse."
    )


def test_model_whose_layers_all_stay_dense_says_why():
    model = nn.Sequential(nn.Linear(16, 8).requires_grad_(False), nn.LSTM(8, 8), nn.Linear(8, 8))
    assert message(ConversionError, model, skip=["2"]) == (
        "no layer of Sequential can be converted:\n"
        "  0: its weight is frozen (requires_grad=False)\n"
        "  1.weight_ih_l0: LSTM runs in a fused kernel that keeps a list of its weights\n"
        "  1.weight_hh_l0: LSTM runs in a fused kernel that keeps a list of its weights\n"
        "  2: left dense on request"
    )


def test_skipping_everything_is_no_conversion():
    assert message(ConversionError, mlp(), skip=["*"]) == (
        "no layer of Sequential can be converted:\n  0: left dense on request\n  2: left dense on request"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_cannot_be_ranked_are_named(value):
    assert message(ConversionError, poisoned(value)) == (
        "2: 2 of 128 weights are NaN or infinite. Start from a checkpoint taken before training diverged, "
        "or leave the layer dense with --skip 2."
    )


def test_weights_that_cannot_be_ranked_may_stay_dense():
    model = nmgraph.convert(poisoned(float("nan")), skip=["2"])
    assert [e.name for e in nmgraph.manifest(model).converted] == ["0"]


def test_converted_model_is_not_converted_again():
    model = nmgraph.convert(mlp())
    assert message(ConversionError, model) == (
        "Sequential is converted already (lbc: 2 sites converted, 0 skipped, 100.0% of their weights). "
        "Convert a dense model, or finalize this one first."
    )


def test_finalized_model_can_be_converted_again():
    finished = nmgraph.finalize(nmgraph.convert(mlp(), method="srste"))
    assert nmgraph.manifest(nmgraph.convert(finished, method="lbc", pattern="1:4")).method == "lbc"


def test_finalized_model_is_not_finalized_again():
    finished = nmgraph.finalize(nmgraph.convert(mlp(), method="srste"))
    with pytest.raises(ConversionError) as caught:
        nmgraph.finalize(finished)
    assert str(caught.value) == "Sequential is finalized already."


def test_dense_model_is_not_finalized():
    with pytest.raises(ConversionError) as caught:
        nmgraph.finalize(mlp())
    assert str(caught.value) == (
        "Sequential is not a converted model. Make it one with nmgraph.convert(model, method=...)."
    )


def test_unknown_mode():
    assert message(ConversionError, mlp(), mode="fx") == (
        'there is no mode \'fx\'. Use "auto" (in place) or "graph" (a GraphModule).'
    )


def test_unknown_method():
    assert message(MethodError, mlp(), method="sr-ste") == (
        "there is no method 'sr-ste'. Did you mean srste or sste? See `nmgraph methods`."
    )


def test_unknown_option_of_a_method():
    assert message(MethodError, mlp(), momentun=0.5) == "lbc has no option 'momentun'. Did you mean momentum?"


def test_pattern_that_the_method_cannot_take():
    assert message(MethodError, mlp(), pattern="8:16") == (
        "0: lbc keeps track of every combination, and 8:16 has 12,870 of them (101 bytes per weight). Choose 4:16, "
        "or the method srste."
    )


@pytest.mark.parametrize("given", [None, torch.zeros(2), "resnet18", nn.Linear, mlp().state_dict()])
def test_what_is_no_module(given):
    assert message(ConversionError, given) == f"a {type(given).__name__} can't be converted; give a torch.nn.Module."


def test_example_inputs_the_model_does_not_take():
    assert message(ExportError, mlp(), example_inputs=torch.zeros(2, 5)) == (
        "Sequential does not take the inputs 2x5 (given): mat1 and mat2 shapes cannot be multiplied (2x5 and 16x16)"
    )


@pytest.mark.parametrize(
    ("given", "kind"), [(3, "int"), ((torch.zeros(2, 16), nn.Linear), "tuple"), ({"input": 3}, "dict")]
)
def test_example_inputs_of_another_kind(given, kind):
    assert message(ExportError, mlp(), example_inputs=given) == (
        f"example_inputs is a {kind}; it must be a tensor, a tuple of tensors or a dict of tensors by argument name."
    )


def test_model_that_cannot_be_copied():
    model = mlp()
    model.lock = threading.Lock()
    assert message(ConversionError, model) == (
        "Sequential can't be copied: cannot pickle '_thread.lock' object. Remove what it holds besides layers and "
        "values, such as open files or locks."
    )


def test_pattern_of_one_layer_is_refused_like_that_of_all():
    assert message(PatternError, Encoder(), layers={"head": "4:2"}) == (
        "pattern 4:2 keeps 4 of every 2 weights, which removes nothing. Did you mean 2:4?"
    )


class Holder:
    """Like a Trainer or a pipeline: no module, but it holds one."""

    def __init__(self, **held):
        self.args = 3
        self.__dict__.update(held)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"model": nn.Linear(4, 4), "model_wrapped": nn.Linear(4, 4)}, "it holds the model: give its .model."),
        ({"unet": nn.Linear(4, 4), "vae": nn.Linear(4, 4)}, "it holds the model: give its .unet or .vae."),
        ({}, "give a torch.nn.Module."),
    ],
)
def test_what_holds_a_model_is_told_apart(held, said):
    assert message(ConversionError, Holder(**held)) == f"a Holder can't be converted; {said}"


def test_fully_sharded_models_are_converted_before(monkeypatch):
    class FullyShardedDataParallel(nn.Module):  # the real one wants a process group; it is found by its name
        def __init__(self, module):
            super().__init__()
            self._fsdp_wrapped_module = module

    inner = nn.Sequential(nn.Linear(16, 16), FullyShardedDataParallel(nn.Linear(16, 16)))
    remedy = "Convert the model before it is sharded, and shard it after."
    assert message(ConversionError, inner) == f"1 is wrapped in FullyShardedDataParallel. {remedy}"
    assert message(ConversionError, FullyShardedDataParallel(nn.Linear(16, 16))) == (
        f"the model is wrapped in FullyShardedDataParallel. {remedy}"
    )


def test_models_of_dtensors_are_converted_before(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(16, 16))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert message(ConversionError, model) == (
            "0.weight is a DTensor, sharded over processes. Convert the model before it is sharded, and shard it after."
        )
    finally:
        dist.destroy_process_group()


def test_lazy_layers_are_not_given_a_shape_by_looking_at_them():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    for door in (nmgraph.convert, nmgraph.inspect):
        with pytest.raises(
            ConversionError, match=r"0\.weight has no shape yet: its layer is lazy\. Run the model once"
        ):
            door(model, example_inputs=torch.ones(1, 16))
    assert nmgraph.inspect(model).inference is None
    assert isinstance(model[0].weight, nn.UninitializedParameter)
