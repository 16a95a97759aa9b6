"""Batch norms folded into convolutions: the same answer, the same zeros, and left alone where that is not certain."""

import pytest
import torch
from models import Branching, resnet
from torch import nn

import nmgraph
from nmgraph.passes.fold_batchnorm import fold_batchnorms


def lively(model):
    """Give batch norms statistics and scales that do something, some negative."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for t in (norm.running_mean, norm.weight.data, norm.bias.data):
                t.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def block(convolution, norm):
    return nn.Sequential(convolution, norm, nn.ReLU())


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (block(nn.Conv1d(8, 12, 3), nn.BatchNorm1d(12)), (2, 8, 9)),
        (block(nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12)), (2, 8, 6, 6)),
        (block(nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12)), (2, 8, 6, 6)),
        (block(nn.Conv3d(8, 12, 2), nn.BatchNorm3d(12)), (2, 8, 4, 4, 4)),
        (block(nn.ConvTranspose2d(8, 12, 2, stride=2), nn.BatchNorm2d(12)), (2, 8, 5, 5)),
    ],
    ids=["Conv1d", "Conv2d", "grouped", "Conv3d", "ConvTranspose2d"],
)
def test_convolution_and_norm_become_one(model, shape):
    x = torch.randn(shape)
    before = lively(model)(x)
    assert fold_batchnorms(model) == ("1",)
    assert type(model[1]) is nn.Identity
    assert torch.allclose(model(x), before, atol=1e-5)


def test_zeros_stay_where_they_are_in_a_real_network():
    model = nmgraph.finalize(nmgraph.convert(lively(resnet()), method="srste"))
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.dim() == 4}
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    folded = fold_batchnorms(model)
    assert len(folded) == 13
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(torch.equal(dict(model.named_parameters())[name] == 0, where) for name, where in zeros.items())
    assert not any((p.view(torch.int32) == -(2**31)).any() for p in model.parameters())  # no negative zeros
    assert torch.allclose(model(x), before, atol=1e-4)
    assert nmgraph.verify(model).holds


class Shared(nn.Module):
    """What is between the two is seen elsewhere."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.convolution(x)
        return y + self.norm(y)


class Twice(Shared):
    """One convolution for two norms."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.convolution(x)) + self.other(self.convolution(-x))


def test_pair_that_others_see_or_that_is_called_twice_is_left():
    for make in (Shared, Twice):
        model, x = lively(make()), torch.randn(2, 4, 3, 3)
        before = model(x)
        assert fold_batchnorms(model) == ()
        assert torch.equal(model(x), before)


def test_norms_without_statistics_in_training_or_watched_by_hooks_are_left():
    without = block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    training = block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).train()
    watched = block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    watched[0].register_forward_hook(lambda *_: None)
    linear = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()  # over positions, if there is an axis of these
    assert [fold_batchnorms(m) for m in (without, training, watched, linear)] == [(), (), (), ()]


def test_parts_of_a_model_without_a_graph_are_folded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail = block(nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16)), Branching()

        def forward(self, x):
            x = self.body(x).mean((2, 3))
            return self.tail(x) if x.sum() > 0 else x

    assert fold_batchnorms(lively(Net())) == ("body.1",)


def test_export_folds_on_request_and_says_so(tmp_path):
    model = nmgraph.convert(lively(resnet()), method="srste")
    x = torch.randn(2, 3, 32, 32)
    report = nmgraph.export(model, tmp_path / "out", example_inputs=x, fold_batchnorm=True)
    assert report.holds
    assert len(report.folded) >= 9
    assert report.to_dict()["folded"] == list(report.folded)


def test_export_refuses_what_answers_otherwise_once_folded(tmp_path):
    class Apart(nn.Module):
        """Uses its parts in a way that their own graphs do not show."""

        def __init__(self):
            super().__init__()
            self.part, self.head = block(nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16)), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            x = self.part[0](x)
            return self.head(x if x.sum() > 0 else -x)

    model = nmgraph.convert(lively(Apart()), method="srste")
    with pytest.raises(nmgraph.NMGraphError, match="answers otherwise once its batch norms are folded"):
        nmgraph.export(model, tmp_path / "out", example_inputs=torch.randn(2, 4, 3, 3), fold_batchnorm=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["safetensors", "hf"])
def test_folded_weights_are_not_written_where_the_dense_model_would_read_them(kind, tmp_path):
    model = nmgraph.convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), method="asp")
    with pytest.raises(nmgraph.NMGraphError, match="fit the dense model no more"):
        nmgraph.export(model, tmp_path / "out", onnx=False, fold_batchnorm=True, **{kind: True})
    assert not (tmp_path / "out").exists()
