"""timm:NAME and torchvision:NAME: what they make, what they refuse, and that files which name them load by themselves."""

import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

import nmgraph
from nmgraph.checkpoint.dense_file import fitting_keys, read_dense
from nmgraph.checkpoint.named_models import NamedModel
from nmgraph.errors import FileError, MissingPackageError

pytestmark = pytest.mark.usefixtures("offline")


def message(text, path=None, error=FileError):
    with pytest.raises(error) as caught:
        read_dense(path, factory=text) if path else read_dense(text)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("timm:resnet18", 1000),
        ("timm:resnet18.a1_in1k,num_classes=7", 7),
        ("torchvision:mobilenet_v3_small", 1000),
        ("torchvision:squeezenet1_1,num_classes=3,dropout=0.25", 3),
    ],
)
def test_name_makes_the_librarys_model_with_random_weights(text, classes):
    dense = read_dense(text)
    assert dense.factory == text
    assert dense.notes == (f"{text} was made with random weights; no file was read.",)
    assert dense.model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, classes)


def test_backbone_of_a_detector_is_not_downloaded():
    model = read_dense("torchvision:lraspp_mobilenet_v3_large,num_classes=4").model
    assert isinstance(model, torchvision.models.segmentation.LRASPP)


def test_options_are_numbers_words_and_truth_values():
    named = NamedModel.parse(
        "timm:vit_tiny_patch16_224,img_size=32,drop_path_rate=0.1,dynamic_img_size=True,global_pool=avg"
    )
    assert named.options == {"img_size": 32, "drop_path_rate": 0.1, "dynamic_img_size": True, "global_pool": "avg"}
    assert (
        str(named) == "timm:vit_tiny_patch16_224,img_size=32,drop_path_rate=0.1,dynamic_img_size=true,global_pool=avg"
    )
    assert NamedModel.parse(str(named)) == named


@pytest.mark.parametrize(
    "text",
    [
        "timm:hf-hub:timm/resnet18",
        "timm:hf_hub:x/y",
        "timm:local-dir:/tmp/x",
        "timm:../x",
        "timm:",
        "timm:résnet",
        "timm: x",
    ],
)
def test_name_that_would_be_fetched_from_elsewhere_is_refused(text):
    assert message(text) == (
        f"{text!r} is no name of timm's own list, and nothing is downloaded here. Write timm:NAME, such as timm:resnet50; "
        "load other models in Python, and save them with torch.save(model, ...)."
    )


@pytest.mark.parametrize(
    "option",
    ["pretrained=true", "checkpoint_path=evil.pth", "weights=DEFAULT", "weights_backbone=x", "pretrained_cfg=x"],
)
def test_option_that_would_read_other_files_is_refused(option):
    key = option.partition("=")[0]
    assert message(f"timm:resnet18,{option}") == (
        f"'timm:resnet18,{option}': {key} would fetch or read other files. Give the weights as a file: --model timm:resnet18."
    )


@pytest.mark.parametrize("option", ["num_classes", "num_classes=", "=3", "x=[1]", "x=a/b", "x=__import__('os')"])
def test_option_of_another_form_is_refused(option):
    assert message(f"timm:resnet18,{option}") == (
        f"{f'timm:resnet18,{option}'!r}: {option!r} is no option. Write KEY=VALUE with a number, a word, true or false: num_classes=10."
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("timm:resnet5", f"timm {timm.__version__} has no model resnet5. Did you mean resnet50, "),
        ("torchvision:resnet5", f"torchvision {torchvision.__version__} has no model resnet5. Did you mean resnet50, "),
        ("timm:qqqqqq", f"timm {timm.__version__} has no model qqqqqq. timm.list_models() has the names."),
        ("timm:resnet18.nope", "timm:resnet18.nope could not be made: RuntimeError: Invalid pretrained tag (nope)"),
        ("timm:resnet18,colour=red", "timm:resnet18,colour=red could not be made: TypeError: "),
        (
            "torchvision:resnet18,num_classes=-1",
            "torchvision:resnet18,num_classes=-1 could not be made: RuntimeError: ",
        ),
    ],
)
def test_model_that_a_library_does_not_have_is_said(text, said):
    assert message(text).startswith(said)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_missing_library_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    there = ", from where your torch came (a CPU build is not PyPI's)" if library == "torchvision" else ""
    assert message(f"{library}:resnet18", error=MissingPackageError) == (
        f"{library}:resnet18 needs the package {library}, which could not be imported: import of {library} halted; None "
        f"in sys.modules. Install {library} in a version that fits your torch{there}: pip install {library}."
    )


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("timm:resnet10t", lambda n: timm.create_model("resnet10t", num_classes=n)),
        (
            "timm:deit_tiny_distilled_patch16_224",
            lambda n: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=n),
        ),
        ("torchvision:squeezenet1_1", lambda n: torchvision.models.squeezenet1_1(num_classes=n)),
        ("torchvision:shufflenet_v2_x0_5", lambda n: torchvision.models.shufflenet_v2_x0_5(num_classes=n)),
    ],
)
def test_number_of_classes_is_read_from_the_state_dict(text, make, tmp_path):
    model = make(37)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    dense = read_dense(tmp_path / "w.pt", factory=text)
    assert dense.factory == f"{text},num_classes=37"
    assert all(torch.equal(a, b) for a, b in zip(dense.model.parameters(), model.parameters(), strict=True))


def test_state_dict_that_no_number_of_classes_fits_is_refused_as_the_named_model(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "w.pt")
    text = message("timm:resnet14t", tmp_path / "w.pt")
    assert text.startswith(f"{tmp_path / 'w.pt'} does not fit ResNet: ")
    text = message("timm:resnet10t,num_classes=5", tmp_path / "w.pt")
    assert "size mismatch for fc.weight" in text


def test_file_that_names_its_model_loads_without_being_told(tmp_path):
    model = timm.create_model("resnet10t", num_classes=5)
    nmgraph.convert(model, method="srste")
    nmgraph.save(model, tmp_path / "m.nm.pt", factory="timm:resnet10t,num_classes=5")
    loaded = nmgraph.load(tmp_path / "m.nm.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert nmgraph.verify(tmp_path / "m.nm.pt", model="timm:resnet10t,num_classes=5").holds


def test_file_cannot_name_a_model_to_download(tmp_path):
    model = nmgraph.convert(timm.create_model("resnet10t"), method="srste")
    nmgraph.save(model, tmp_path / "m.nm.pt", factory="timm:hf-hub:someone/model")
    with pytest.raises(FileError, match="is no name of timm's own list"):
        nmgraph.load(tmp_path / "m.nm.pt")


def test_name_that_is_a_file_here_is_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(16, 8), "timm:resnet18")
    assert type(read_dense("timm:resnet18").model) is nn.Linear


def test_name_needs_no_other_model():
    with pytest.raises(FileError, match=r"^timm:resnet18 names a whole model; leave --model timm:resnet18 away\.$"):
        read_dense("timm:resnet18", factory="timm:resnet18")


def small():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
def test_prefix_of_a_wrapper_is_taken_off_and_said(prefix, tmp_path):
    model, path = small(), tmp_path / "w.pt"
    torch.save({"state_dict": {prefix + k: v for k, v in model.state_dict().items()}, "epoch": 3}, path)
    dense = read_dense(path, factory="models:mlp")
    assert dense.notes == (f"All keys of w.pt begin with {prefix!r}, which was taken off.",)
    assert torch.equal(dense.model[2].weight, model[2].weight)


def test_state_dict_of_an_average_loads(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(small())
    torch.save(average.state_dict(), tmp_path / "w.pt")
    dense = read_dense(tmp_path / "w.pt", factory="models:mlp")
    assert torch.equal(dense.model[0].weight, average.module[0].weight)


def test_prefix_stays_where_the_rest_does_not_fit():
    state = {"module.a": 1, "module.b": 2}
    assert fitting_keys(state, {"a", "c"}) == (state, "")
    assert fitting_keys({"module.a": 1, "other.b": 2}, {"a", "b"}) == ({"module.a": 1, "other.b": 2}, "")
    assert fitting_keys({"x.y.z.w.a": 1}, {"a"}) == ({"x.y.z.w.a": 1}, "")


def test_average_beside_no_other_state_is_pointed_to(tmp_path):
    torch.save({"state_dict_ema": small().state_dict(), "epoch": 3}, tmp_path / "w.pt")
    assert message("models:mlp", tmp_path / "w.pt") == (
        f"{tmp_path / 'w.pt'} holds a state_dict only under state_dict_ema. Save the one you mean by itself: "
        "torch.save(checkpoint['state_dict_ema'], ...)."
    )
