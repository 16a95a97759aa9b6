"""What would train dense, or multiply by other zeros, without a word: refused, or said."""

import copy
import threading

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import nmgraph
from nmgraph.errors import ConversionError


class Net(nn.Module):
    """One bare parameter, multiplied as asked."""

    def __init__(self, multiply, *shape):
        super().__init__()
        self.w, self.head, self.multiply = nn.Parameter(torch.randn(shape or (16, 16))), nn.Linear(16, 8), multiply

    def forward(self, x):
        return self.head(self.multiply(self, x))


def found(model, site, **options):
    converted = nmgraph.convert(model, method="srste", **options)
    return next(e for e in nmgraph.manifest(converted).entries if e.name == site)


@pytest.mark.parametrize("inputs", [None, torch.randn(3, 16)], ids=["by graph", "by run"])
@pytest.mark.parametrize(
    "read",
    [lambda s, x: F.linear(x, s._parameters["w"]), lambda s, x: F.linear(x, dict(s.named_parameters())["w"])],
    ids=["_parameters", "named_parameters"],
)
def test_parameter_read_past_its_mask_is_refused_and_the_model_left_as_it_was(read, inputs):
    model = Net(read)
    before = set(vars(model))
    with pytest.raises(ConversionError, match="Net reads w past its mask"):
        nmgraph.convert(model, method="srste", example_inputs=inputs)
    assert type(model) is Net
    assert set(vars(model)) == before
    assert set(model._buffers) == set()


@pytest.mark.parametrize("inputs", [None, torch.randn(3, 16)], ids=["by graph", "by run"])
@pytest.mark.parametrize("name", ["w", "fc"])
def test_parameter_that_a_module_keeps_beside_stays_dense(name, inputs):
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.fc = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 16)
            self.kept = [self.w if name == "w" else self.fc.weight]
            self.head = nn.Linear(16, 8)

        def forward(self, x):
            return self.head(F.linear(self.fc(x), self.kept[0]))

    assert found(Kept(), name, example_inputs=inputs).reason.startswith("a module keeps it in an attribute of its own")


def test_layer_that_changes_its_weight_in_its_forward_stays_dense():
    class Renormed(nn.Conv2d):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
            return super().forward(x)

    entry = found(nn.Sequential(Renormed(8, 8, 3), nn.Conv2d(8, 4, 1)), "0")
    assert entry.reason == "Renormed changes its weight in its forward"


def clamped(s, x):
    with torch.no_grad():
        s.w.clamp_(-0.5, 0.5)
    return F.linear(x, s.w)


@pytest.mark.parametrize("inputs", [None, torch.randn(3, 16)], ids=["by graph", "by run"])
def test_bare_parameter_that_a_forward_writes_to_stays_dense_and_is_not_written_to_by_looking(inputs):
    model = Net(clamped)
    before = model.w.detach().clone()
    entry = found(model, "w", example_inputs=inputs)
    assert not entry.converted
    assert "computed from this parameter" in entry.reason
    assert torch.equal(model.w, before)


def test_layers_with_adapters_in_their_own_parameters_stay_dense():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(16, 16)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(16, 4))

        def forward(self, x):
            return F.linear(x, self.weight) + x @ self.lora_A.T @ self.lora_B.T

    assert "adapter" in found(nn.Sequential(Adapted(), nn.Linear(16, 8)), "0").reason


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(16, 8)

    def forward(self, x):
        return F.linear(self.encoder(x), self.encoder.weight.t())


def test_layer_multiplied_along_another_axis_too_is_converted_on_request_and_no_proof_holds(tmp_path):
    beside = nn.Sequential(Autoencoder(), nn.Linear(16, 8))
    assert found(beside, "0.encoder").reason == (
        "linear multiplies by its weight, too, along axis 0, where it would not be N:M"
    )
    model = nmgraph.convert(Autoencoder(), method="srste", include=["encoder"])
    report = nmgraph.export(model, tmp_path / "out", example_inputs=torch.randn(3, 16))
    assert report.parity.holds
    assert not report.onnx.holds


@pytest.mark.parametrize("inputs", [None, torch.randn(3, 16)], ids=["by graph", "by run"])
@pytest.mark.parametrize(
    "multiply",
    [
        lambda s, x: F.linear(x[:, :8], s.w[:, 2:10]),
        lambda s, x: F.linear(x[:, :6], s.w.split([6, 6, 4], 1)[0]),
        lambda s, x: F.linear(x[:, :8], s.w[:, ::2]),
        lambda s, x: F.linear(x[:, :8], s.w.chunk(2, 1)[1]),
        lambda s, x: F.linear(x[:, :8], s.w.narrow(1, 3, 8)),
    ],
    ids=["slice", "split", "steps", "chunk", "narrow"],
)
def test_part_along_the_reduction_axis_need_not_hold_whole_blocks(multiply, inputs):
    assert not found(Net(multiply), "w", example_inputs=inputs).converted


@pytest.mark.parametrize("inputs", [None, torch.randn(3, 16)], ids=["by graph", "by run"])
def test_parts_along_the_other_axis_are_converted(inputs):
    model = Net(lambda s, x: sum(F.linear(x, part) for part in s.w.chunk(2, 0)), 32, 16)
    assert not found(Net(lambda s, x: F.linear(x, s.w[:16]), 32, 16), "w", example_inputs=inputs).reason
    if inputs is not None:  # the graph can't iterate over parts
        assert found(model, "w", example_inputs=inputs).converted


@pytest.mark.parametrize("cast", [lambda s, x: s.w.to(x.dtype), lambda s, x: s.w.type_as(x)], ids=["to", "type_as"])
def test_parameter_cast_to_the_dtype_of_the_input_is_converted_from_the_graph(cast):
    assert found(Net(lambda s, x: F.linear(x, cast(s, x))), "w").converted


def test_layers_that_share_a_weight_along_different_axes_stay_dense():
    linear, other = nn.Linear(16, 16), Conv1D(16, 16)
    other.weight = linear.weight
    model = nmgraph.convert(nn.Sequential(linear, other, nn.Linear(16, 8)), method="srste", include=["*"])
    assert {e.name: e.reason for e in nmgraph.manifest(model).skipped} == dict.fromkeys(
        ["0", "1"], "its weight is shared by layers that sum over different axes of it"
    )


def test_embedding_that_is_multiplied_by_too_stays_dense_unless_asked_for():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.body = nn.Embedding(24, 16), nn.Linear(16, 16)

        def forward(self, tokens):
            return F.linear(self.body(self.emb(tokens)), self.emb.weight)

    for inputs in (None, torch.randint(24, (2, 5))):
        assert found(Tied(), "emb", example_inputs=inputs).reason == "it is the table of an embedding, too"
    model = nmgraph.convert(Tied(), method="srste", include=["emb"])
    tokens = torch.randint(24, (2, 5))
    assert torch.equal(nmgraph.finalize(model)(tokens), model(tokens))
    assert (model.emb.weight == 0).float().mean() == 0.5


def test_stack_of_convolution_kernels_stays_dense():
    class Kernels(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.head = nn.Parameter(torch.randn(3, 8, 8, 3, 3)), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.head(F.conv2d(x, self.k[1]))

    assert not found(Kernels(), "k").converted


def test_buffers_of_the_users_own_stay_whatever_their_name(tmp_path):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(16, 8)
            self.register_buffer("nm_stats", torch.zeros(3))

    model = nn.Sequential(Counting())
    model.nm_scale = nn.Parameter(torch.ones(16))
    nmgraph.convert(model, method="srste")
    finished = nmgraph.finalize(model)
    assert "nm_stats" in finished[0]._buffers
    assert set(finished.state_dict()) == {"nm_scale", "0.weight", "0.bias", "0.nm_stats"}


def test_a_users_own_parameter_named_as_ours_are_survives_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8))
    model.nm_scale = nn.Parameter(torch.randn(16))
    nmgraph.convert(model, method="lbc")
    nmgraph.save(model, tmp_path / "a.nm.pt")
    assert torch.equal(nmgraph.load(tmp_path / "a.nm.pt").nm_scale, model.nm_scale)


def test_name_that_ours_takes_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    model[1].nm_clock = nn.Parameter(torch.ones(2))
    with pytest.raises(ConversionError, match="1: Linear has a nm_clock of its own"):
        nmgraph.convert(model, method="srste")
    assert type(model[0]) is nn.Linear


class Tagged(nn.Linear):
    def __init_subclass__(cls, *, tag):
        super().__init_subclass__()


def test_class_that_no_class_can_be_made_from_is_refused_and_the_model_left_as_it_was():
    model = nn.Sequential(nn.Linear(16, 16), Tagged(16, 8))
    with pytest.raises(ConversionError, match="1: no class can be made from Tagged"):
        nmgraph.convert(model, method="srste")
    assert [type(m) for m in model] == [nn.Linear, Tagged]
    assert not [name for name, _ in model.named_buffers()]


def test_module_with_a_setattr_of_its_own_is_converted():
    class Strict(nn.Linear):
        def __setattr__(self, name, value):
            if name.startswith("nm") or name == "__class__":
                raise AttributeError(name)
            super().__setattr__(name, value)

    model = nmgraph.convert(nn.Sequential(Strict(16, 8)), method="srste")
    assert type(nmgraph.finalize(model)[0]) is Strict


def test_module_that_says_itself_what_is_copied_of_it():
    class Locked(nn.Linear):
        def __init__(self):
            super().__init__(16, 8)
            self.lock = threading.Lock()

        def __getstate__(self):
            return {k: v for k, v in self.__dict__.items() if k != "lock"}

        def __setstate__(self, state):
            super().__setstate__(state)
            self.lock = threading.Lock()

    model, x = nmgraph.convert(nn.Sequential(Locked()), method="srste"), torch.randn(3, 16)
    assert torch.equal(nmgraph.finalize(model)(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_scripted_part_is_left_alone():
    model = nmgraph.convert(nn.Sequential(torch.jit.script(nn.Linear(16, 16)), nn.Linear(16, 8)), method="srste")
    assert [e.name for e in nmgraph.manifest(model).converted] == ["1"]


def test_memory_format_of_five_axes_leaves_the_state_alone():
    model = nmgraph.convert(nn.Sequential(nn.Conv3d(8, 8, 2)), method="lbc").to(memory_format=torch.channels_last_3d)
    assert nm(model[0]).raw.is_contiguous(memory_format=torch.channels_last_3d)
    assert model(torch.randn(1, 8, 3, 3, 3)).shape == (1, 8, 2, 2, 2)


def test_weights_in_eight_bits_stay_dense():
    layer = nn.Linear(16, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert found(nn.Sequential(layer, nn.Linear(8, 8)), "0").reason == "its weight is torch.float8_e4m3fn"


def test_parametrized_bias_is_no_obstacle():
    layer = nn.Linear(16, 8)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    assert found(nn.Sequential(layer), "0").converted
    assert not found(nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 8)), nn.Linear(8, 8)), "0").converted


def test_attention_that_computes_on_its_weights_is_not_converted_unseen():
    class Centred(nn.MultiheadAttention):
        def forward(self, x):
            w = self.in_proj_weight - self.in_proj_weight.mean(1, keepdim=True)
            return F.linear(x, w, self.in_proj_bias)[..., :16]

    assert not found(nn.Sequential(Centred(16, 2), nn.Linear(16, 8)), "0.in_proj_weight").converted


def test_meta_model_without_values_is_told_to_load_them_first():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 8))
    nmgraph.convert(model, method="lbc")
    with pytest.raises(ConversionError, match="0 is on the meta device, where weights have no values"):
        nmgraph.finalize(model)
    with pytest.raises(ConversionError, match="meta device"):
        nmgraph.finalize(model, force=True)


@pytest.mark.parametrize(
    ("multiply", "shape"),
    [
        (lambda s, x: torch.einsum("bi,oi->bo", x, s.w), (16, 16)),
        (lambda s, x: torch.einsum("bi,eoi->bo", x, s.w), (3, 16, 16)),
        (lambda s, x: torch.bmm(x.expand(3, -1, -1), s.w.transpose(1, 2)).sum(0), (3, 16, 16)),
    ],
    ids=["einsum", "einsum over a stack", "turned stack"],
)
def test_bare_products_are_proved_in_the_file(multiply, shape, tmp_path):
    x = torch.randn(3, 16)
    model = nmgraph.convert(Net(multiply, *shape), method="srste", example_inputs=x)
    report = nmgraph.export(model, tmp_path / "out", example_inputs=x)
    assert report.holds, str(report.onnx)
