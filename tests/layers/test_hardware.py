"""Layers that train on sparse tensor cores, by a stand-in for the kernels, against layers that multiply by masked weights."""

import copy
import os
import pickle

import pytest
import stand_in
import torch
import torch._dynamo.testing
from handles import nm
from ranks import on_ranks
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import nmgraph
from nmgraph.layers import hardware as accelerated
from nmgraph.layers import probe
from nmgraph.layers.sparse_product import DENSE
from nmgraph.passes import hardware

BF16 = torch.bfloat16
FIRST_TO_LAST = ("asp", "bimask", "rigl", "srste", "sste", "static", "tmask")  # N:M from the first step to the last
LATER = ("bame", "gradual", "lbc", "maxq", "decaying-mask")


@pytest.fixture(autouse=True)
def kernels(no_timings, monkeypatch):
    monkeypatch.setattr(probe, "_ROUNDS", 1)
    monkeypatch.setattr(probe, "_WARM_UP", 0)
    monkeypatch.setattr(hardware, "_FEW", 0)
    with stand_in.kernels() as calls:
        yield calls


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))


def trained(model, method="tmask", hardware="force", steps=3, total=10, dtype=BF16, micro=1, **options):
    """Convert, attach and train on the same data; give the model, and what each step's loss and gradients were."""
    model = nmgraph.convert(model, method=method, hardware=hardware, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    controller = nmgraph.attach(model, optimizer, total_steps=total)
    return model, controller, train(model, optimizer, steps, dtype, micro)


def train(model, optimizer, steps=3, dtype=BF16, micro=1, inputs=(24, 64)):
    drawn, seen = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        for _ in range(micro):
            x = torch.randn(inputs, generator=drawn)
            with torch.autocast("cpu", dtype=dtype):
                loss = model(x).float().square().mean()
            loss.backward()
        seen.append([loss.item(), *(p.grad.clone() for p in model.parameters())])
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_same(one, other, **tolerance):
    for ours, theirs in zip(one, other, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("method", sorted(nmgraph.METHODS))
def test_training_is_that_of_masked_weights(method, kernels):
    total = 8
    options = {"interval": 1} if method in ("bimask", "tmask", "bame", "rigl") else {}
    sparse, _, ours = trained(network(), method, steps=total, total=total, **options)
    called = len(kernels)
    _, _, theirs = trained(network(), method, hardware="off", steps=total, total=total, **options)
    assert called
    assert len(kernels) == called
    assert_same(ours, theirs, rtol=0.02, atol=0.02)
    assert nmgraph.verify(nmgraph.finalize(sparse)).holds


@pytest.mark.parametrize("method", FIRST_TO_LAST)
def test_methods_that_are_sparse_throughout_use_it_from_the_first_step(method):
    model, _, _ = trained(network(), method, steps=0)
    assert nm(model[0]).hardware.is_open


@pytest.mark.parametrize("method", LATER)
def test_methods_that_become_sparse_use_it_from_then_on(method):
    assert sorted((*FIRST_TO_LAST, *LATER)) == sorted(nmgraph.METHODS)
    model = nmgraph.convert(network(), method=method, hardware="force")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    nmgraph.attach(model, optimizer, total_steps=12)
    opened = []
    for _ in range(12):
        opened.append(nm(model[0]).hardware.is_open)
        assert not opened[-1] or not nm(model[0]).unfinished()
        train(model, optimizer, 1)
    assert opened[0] is False
    assert nm(model[0]).hardware.is_open


def test_a_layer_whose_masks_are_loaded_from_an_earlier_time_waits_until_they_are_2_4_again():
    model = nmgraph.convert(network(), method="lbc", hardware="force")
    early = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    nmgraph.attach(model, optimizer, total_steps=6)
    train(model, optimizer, 6)
    assert nm(model[0]).hardware.is_open
    model.load_state_dict(early)
    train(model, optimizer, 1)  # the stand-in would refuse the dense masks
    assert not nm(model[0]).hardware.is_open


@pytest.mark.parametrize("micro", [1, 4])
def test_weights_are_compressed_once_a_step_whatever_the_micro_batches(micro, kernels):
    model = nmgraph.convert(network(), method="tmask", hardware="force")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    nmgraph.attach(model, optimizer, total_steps=10)
    train(model, optimizer, 1)  # in which products are timed
    kernels.clear()
    train(model, optimizer, 2, micro=micro)
    # One operand of the first layer, whose input needs no gradient, and two of the second one.
    assert sum(call[0] == "compress" for call in kernels) == 2 * 3
    assert sum(call[0] == "multiply" for call in kernels) == 2 * 3 * micro


@pytest.mark.parametrize(
    "change", ["in place", "by .data", "by .data, again and again", "by load_state_dict", "fused step", "cast"]
)
def test_a_changed_weight_is_never_multiplied_by_as_it_was(change):
    model, _, _ = trained(network(), "tmask", steps=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, fused=True)
    x = torch.randn(8, 64)

    def answers():
        with torch.autocast("cpu", dtype=BF16):
            return model(x), copy_without_hardware(model)(x)

    first, _ = answers()
    weight = nm(model[0]).raw
    if change == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif change == "by .data":
        weight.data = weight.data * 2
    elif change == "by .data, again and again":
        place = weight.data_ptr()
        for _ in range(20):  # memory that was freed is taken again
            weight.data = weight.data * 2
            if weight.data_ptr() == place:
                break
    elif change == "by load_state_dict":
        model.load_state_dict({key: t * 2 if key == "0.weight" else t for key, t in model.state_dict().items()})
        train(model, torch.optim.SGD(model.parameters(), 0.0), 1)
    elif change == "fused step":
        first.float().sum().backward()
        optimizer.step()
    else:
        model.double().float()
        weight.data.mul_(2)
    ours, theirs = answers()
    assert not torch.equal(ours, first)
    torch.testing.assert_close(ours, theirs)


def copy_without_hardware(model):
    copied = copy.deepcopy(model)
    hardware.allow_hardware(copied, "off")
    return copied


@pytest.mark.parametrize("method", ["tmask", "bimask", "srste"])
@pytest.mark.parametrize("make", [
    lambda: nn.Conv2d(32, 64, 1), lambda: nn.Conv2d(32, 64, 1, stride=2, bias=False), lambda: nn.Conv3d(32, 16, 1),
], ids=["conv", "strided", "3d"])  # fmt: skip
def test_1x1_convolutions_in_channels_last_are_products_of_matrices(method, make, kernels):
    torch.manual_seed(0)
    made = nn.Sequential(make(), nn.ReLU(), type(make())(make().out_channels, 32, 1))
    found = []
    for mode in ("force", "off"):
        model, _, _ = trained(copy.deepcopy(made), method, mode, steps=0)
        last = torch.channels_last if isinstance(made[0], nn.Conv2d) else torch.channels_last_3d
        size = (2, 32, 6, 6) if isinstance(made[0], nn.Conv2d) else (2, 32, 2, 6, 6)
        x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(memory_format=last).requires_grad_()
        kernels.clear()
        with torch.autocast("cpu", dtype=BF16):
            y = model(x)
        y.float().square().mean().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters())])
        assert bool([c for c in kernels if c[0] == "multiply"]) == (mode == "force")
    assert found[0][0].is_contiguous(memory_format=last)
    assert_same(found[:1], found[1:], rtol=0.02, atol=0.02)


def test_a_convolution_of_channels_first_stays_dense(kernels):
    model, _, _ = trained(nn.Sequential(nn.Conv2d(32, 64, 1)), "tmask", steps=0)
    kernels.clear()
    with torch.autocast("cpu", dtype=BF16):
        model(torch.randn(2, 32, 4, 4))
        model(torch.randn(32, 4, 4))
    assert not kernels


def test_hugging_faces_conv1d_is_turned(kernels):
    def made():
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(128, 64), nn.GELU(), Conv1D(32, 128))

    _, _, ours = trained(made(), "bimask", interval=1)
    assert any(call[0] == "multiply" for call in kernels)
    _, _, theirs = trained(made(), "bimask", hardware="off", interval=1)
    assert_same(ours, theirs, rtol=0.02, atol=0.02)


def test_inputs_of_any_number_of_axes_and_dtype(kernels):
    model, _, _ = trained(network(), steps=0)
    reference = copy_without_hardware(model)
    for shape in ((64,), (5, 64), (2, 3, 64), (0, 64), (2, 1, 3, 64)):
        for dtype in (torch.float32, BF16):
            x = torch.randn(shape).to(dtype)
            with torch.autocast("cpu", dtype=BF16):
                torch.testing.assert_close(model(x), reference(x), rtol=0.02, atol=0.02)
    kernels.clear()
    model(torch.randn(8, 64))  # float32, without autocast
    model.eval()
    with torch.autocast("cpu", dtype=BF16):
        model(torch.randn(8, 64))
    assert not kernels


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_may_be_computed_again(reentrant):
    model, _, _ = trained(network(), steps=0)
    x = torch.randn(8, 64, requires_grad=True)
    found = []
    for again in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=BF16):
            y = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
            y.float().square().mean().backward()
        found.append([y, *(p.grad.clone() for p in model.parameters())])
    assert_same(found[:1], found[1:])


@pytest.mark.parametrize("method", ["tmask", "bimask", "srste"])
def test_compiled_in_one_graph(method, kernels):
    _, _, theirs = trained(network(), method, interval=1) if method != "srste" else trained(network(), method)
    model = nmgraph.convert(
        network(), method=method, hardware="force", **({} if method == "srste" else {"interval": 1})
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    nmgraph.attach(model, optimizer, total_steps=10)
    kernels.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours = train(compiled, optimizer)
    assert any(call[0] == "multiply" for call in kernels)
    assert_same(ours, theirs, rtol=0.02, atol=0.02)


def test_compiled_where_dynamo_takes_every_trace_for_an_export(kernels, monkeypatch):
    model, _, _ = trained(network(), steps=1)
    monkeypatch.setattr(
        torch.compiler, "is_exporting", lambda: torch.compiler.is_dynamo_compiling()
    )  # as in torch 2.11
    kernels.clear()
    with torch.autocast("cpu", dtype=BF16):
        torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(24, 64))
    assert [call[0] for call in kernels].count("multiply") == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tmask", "bimask"])
def test_compiled_by_inductor(method):
    _, _, theirs = trained(network(), method, interval=1)
    model = nmgraph.convert(network(), method=method, hardware="force", interval=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    nmgraph.attach(model, optimizer, total_steps=10)
    assert_same(train(torch.compile(model, fullgraph=True), optimizer), theirs, rtol=0.02, atol=0.02)


def test_blocks_that_are_alike_are_compiled_once():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    model, _, _ = trained(model, "tmask", steps=0)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for block in model:
        block.forward = torch.compile(block.forward, backend=counter)
    with torch.autocast("cpu", dtype=BF16):
        model(torch.randn(8, 64, dtype=BF16, requires_grad=True))
    assert counter.frame_count == 1


class Descent(torch.optim.Optimizer):
    """Evaluates its closure several times a step, and writes through .data between, as some line searches do."""

    def step(self, closure):
        with torch.enable_grad():
            losses = [closure() for _ in range(3) if not self.descend()]
        return losses[-1]

    def descend(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.data.sub_(self.defaults["lr"] * p.grad)


def test_an_optimizer_that_evaluates_its_closure_several_times_sees_the_weights_as_they_are():
    found = []
    for mode in ("force", "off"):
        model = nmgraph.convert(network(), method="tmask", hardware=mode)
        optimizer = Descent(model.parameters(), {"lr": 5.0})
        nmgraph.attach(model, optimizer, total_steps=10)
        losses, x = [], torch.randn(24, 64, generator=torch.Generator().manual_seed(1))

        def closure(model=model, optimizer=optimizer, losses=losses, x=x):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=BF16):
                loss = model(x).float().square().mean()
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
        optimizer.step(closure)
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=0.05)


@pytest.mark.parametrize("method", ["lbc", "maxq"])
@pytest.mark.parametrize("pattern", ["1:3", "2:8", "1:32"])
def test_masks_that_become_sparser_than_2_4_are_used_whatever_a_share_is_rounded_to(method, pattern):
    model = nmgraph.convert(nn.Sequential(nn.Linear(96, 32)), method=method, pattern=pattern, hardware="force")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    nmgraph.attach(model, optimizer, total_steps=4)
    train(model, optimizer, 4, inputs=(8, 96))
    assert nm(model[0]).hardware.is_open


@pytest.mark.parametrize("method", ["tmask", "bimask", "srste"])
@pytest.mark.parametrize("shape", [(24, 64), (7, 64), (3, 5, 64), (2, 64, 3, 5)], ids=str)
def test_what_it_gives_may_be_changed_in_place(method, shape, kernels):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32) if len(shape) < 4 else nn.Conv2d(64, 32, 1)
    model, _, _ = trained(nn.Sequential(layer, nn.ReLU(inplace=True)), method, steps=0)
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    kernels.clear()
    found = []
    for each in (model, copy_without_hardware(model)):
        x.grad = None
        x.requires_grad_()
        with torch.autocast("cpu", dtype=BF16):
            y = each(x)
        y.float().square().mean().backward()
        found.append([y, x.grad, *(p.grad for p in each.parameters())])
    assert any(call[0] == "multiply" for call in kernels)
    assert_same(found[:1], found[1:], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kept", [torch.float32, torch.float64, BF16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, BF16, torch.float16, torch.int64, torch.complex64])
@pytest.mark.parametrize("autocast", [None, BF16, torch.float16])
def test_what_its_own_forward_would_not_multiply_in_half_precision_it_refuses_or_computes_alike(kept, given, autocast):
    model, _, _ = trained(nn.Sequential(nn.Linear(64, 32)).to(kept), "srste", steps=0)
    x, found = torch.randint(-3, 4, (8, 64)).to(given), []
    for each in (model, copy_without_hardware(model)):
        try:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                y = each(x)
            y.float().sum().backward()
            found.append([y, *(p.grad for p in each.parameters())])
        except RuntimeError as refused:
            found.append(str(refused))
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        assert_same(found[:1], found[1:], rtol=0.02, atol=0.02)


def test_a_gradient_of_a_gradient_is_never_wrong():
    model, _, _ = trained(network(), "srste", steps=0)  # whose input gradient multiplies by a dense operand
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        y = model(x)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='hardware="off"'):
        dx.square().sum().backward()


def test_nested_tensors_and_forward_mode_fall_back(kernels):
    model, _, _ = trained(network(), steps=0)
    reference, x = copy_without_hardware(model), torch.randn(3, 64)
    kernels.clear()
    with torch.autocast("cpu", dtype=BF16):
        ours, theirs = (m(torch.nested.nested_tensor([x, x[:2]])) for m in (model, reference))
        assert all(torch.equal(a, b) for a, b in zip(ours.unbind(), theirs.unbind(), strict=True))
        with forward_ad.dual_level():
            ours, theirs = (forward_ad.unpack_dual(m(forward_ad.make_dual(x, x))) for m in (model, reference))
            assert torch.equal(ours.tangent, theirs.tangent)
    assert not kernels


class _Through(torch.fx.Tracer):
    def is_leaf_module(self, *_):
        return False


@pytest.mark.parametrize("trace", [lambda model, x: torch.jit.trace(model, x, check_trace=False), lambda model, x: torch.export.export(model, (x,)).module(),
    lambda model, x: torch.fx.GraphModule(model, _Through().trace(model))], ids=["jit", "export", "fx"])  # fmt: skip
def test_what_traces_a_model_in_training_sees_an_ordinary_layer(trace, kernels):
    model, _, _ = trained(nn.Sequential(nn.Linear(64, 32)).to(BF16), steps=0)
    x = torch.randn(8, 64, dtype=BF16)
    expected = copy_without_hardware(model)(x)
    kernels.clear()
    graph = trace(model, x)
    assert not kernels
    assert torch.equal(graph(x), expected)


def test_transforms_inside_of_compiled_code_fall_back(kernels):
    model, _, _ = trained(network().to(BF16), steps=0)
    x = torch.randn(8, 64, dtype=BF16)
    kernels.clear()
    gradient = torch.func.grad(lambda x: model(x).float().square().sum())
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(x), gradient(x))
    assert not kernels


def test_where_there_are_no_kernels_nothing_is_timed_and_layers_are_ordinary(kernels, monkeypatch):
    model, _, _ = trained(network(), steps=1)
    again = pickle.loads(pickle.dumps(model))
    nmgraph.attach(again, torch.optim.SGD(again.parameters(), 0.1), total_steps=10)
    # As after model.cpu(), or where a model from a GPU is loaded without one.
    monkeypatch.setattr(accelerated, "_has_kernels", lambda device: False)
    monkeypatch.setattr(probe, "measure", lambda *_: pytest.fail("a product was timed"))
    kernels.clear()
    for each in (model, again):
        train(each, torch.optim.SGD(each.parameters(), 0.0), 1)
    assert not kernels


def test_copies_and_pickles_go_on(kernels):
    model, _, _ = trained(network(), steps=1)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is type(model[0])
        assert nm(again[0]).hardware.mode == "force"
        assert not nm(again[0]).hardware.is_open  # it has no optimizer yet
        optimizer = torch.optim.SGD(again.parameters(), 0.01)
        nmgraph.attach(again, optimizer, total_steps=10)
        kernels.clear()
        train(again, optimizer, 1)
        assert any(call[0] == "multiply" for call in kernels)


def test_a_detached_model_multiplies_by_masked_weights(kernels):
    model, controller, _ = trained(network())
    controller.detach()
    kernels.clear()
    with torch.autocast("cpu", dtype=BF16):
        model(torch.randn(8, 64))
    assert not kernels


def test_transforms_of_functions_fall_back(kernels):
    model, _, _ = trained(network().to(BF16), steps=0)
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 64, dtype=BF16)
    kernels.clear()

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).float().square().mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert each["0.bias"].shape == (4, 128)
    assert not kernels


def test_called_with_other_parameters_it_multiplies_by_these():
    model, _, _ = trained(network().to(BF16), steps=0)
    x = torch.randn(4, 64, dtype=BF16)
    before = model(x)
    for factor in (2, 3, 4):  # which all lie at one place in memory
        others = {name: factor * p.detach() for name, p in model.named_parameters()}
        other = torch.func.functional_call(model, others, (x,))
        torch.testing.assert_close(other, torch.func.functional_call(copy_without_hardware(model), others, (x,)))
        del others
    assert torch.equal(model(x), before)


def _rank(rank, world, path):
    os.environ["NMGRAPH_CACHE"] = str(path / f"cache{rank}")
    probe._ROUNDS, probe._WARM_UP = 1, 0
    with stand_in.kernels() as calls:
        model = nmgraph.convert(network(), method="bimask", interval=1, hardware="force")
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        controller = nmgraph.attach(model, optimizer, total_steps=10)
        for step in range(3):
            if step == 1:
                calls.clear()  # products were timed in the first one
            for _ in range(2):
                x = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank))
                with torch.autocast("cpu", dtype=BF16):
                    wrapped(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        controller.check_ranks()
        packed = sum(call[0] == "compress" for call in calls)
        torch.save({"weights": model.state_dict(), "packed": packed}, path / f"{rank}.pt")


def test_two_processes_stay_equal_and_compress_once_a_step(tmp_path):
    on_ranks(2, _rank, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(t, other["weights"][key]) for key, t in one["weights"].items())
    assert one["packed"] == other["packed"] == 2 * 3


@pytest.mark.parametrize("rows", [21, 24])
def test_activations_may_be_changed_in_place(rows):
    found = []
    for mode in ("force", "off"):
        torch.manual_seed(0)
        made = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(inplace=True), nn.Linear(128, 32), nn.Dropout(0.0, inplace=True)
        )
        model, _, _ = trained(made, "bimask", mode, steps=0)
        found.append(train(model, torch.optim.SGD(model.parameters(), 0.1), inputs=(rows, 64)))
    assert_same(*found, rtol=0.02, atol=0.02)


def test_two_forwards_before_a_backward_under_ddp(tmp_path):
    on_ranks(2, _two_forwards)


def _two_forwards(rank, world):
    with stand_in.kernels():
        model = nmgraph.convert(network(), method="bimask", interval=1, hardware="force")
        wrapped = nn.parallel.DistributedDataParallel(model)
        nmgraph.attach(model, torch.optim.SGD(model.parameters(), 0.05), total_steps=10)
        with torch.autocast("cpu", dtype=BF16):
            one, other = (wrapped(torch.randn(8, 64)) for _ in range(2))
        (one.float().sum() + other.float().sum()).backward()


def told(**times):
    """Let all products take these times, dense and sparse."""
    return lambda product, device: probe.Timing(**times)


@pytest.mark.parametrize(("times", "sparse"), [
    ({"dense": 1.0, "sparse": 0.5}, True),
    ({"dense": 1.0, "sparse": 0.99}, False),  # noise
    ({"dense": 1.0, "sparse": 0.5, "prepare": 0.6}, False),
    ({"dense": 1.0, "sparse": 0.5, "gather": 0.6}, False),
    ({"dense": 1.0, "failure": "architecture mismatch"}, False),
])  # fmt: skip
def test_a_product_is_sparse_only_where_that_is_faster_and_right(times, sparse, monkeypatch):
    monkeypatch.setattr(probe, "measure", told(**times))
    model, _, _ = trained(network(), hardware="auto", steps=1)
    route = nm(model[0]).hardware.latest.route
    assert (route.forward, route.input_gradient) == ((0, 0) if sparse else (DENSE, DENSE))


def test_forward_and_input_gradient_are_decided_apart(monkeypatch, kernels):
    monkeypatch.setattr(
        probe, "measure", lambda p, device: probe.Timing(1.0, 0.5 if p.input_gradient else 2.0, algorithm=7)
    )
    model, _, ours = trained(network(), hardware="auto")
    assert nm(model[2]).hardware.latest.route[1:3] == (DENSE, 7)
    assert {call[1][:2] for call in kernels if call[0] == "multiply"} == {(128, 32)}
    _, _, theirs = trained(network(), hardware="off")
    assert_same(ours, theirs, rtol=0.02, atol=0.02)


def test_where_nothing_is_sparse_the_layer_is_an_ordinary_one(monkeypatch, kernels):
    monkeypatch.setattr(probe, "measure", told(dense=1.0, sparse=2.0))
    _, _, ours = trained(network(), hardware="auto")
    _, _, theirs = trained(network(), hardware="off")
    assert_same(ours, theirs, rtol=0, atol=0)
    assert not kernels


def test_each_number_of_rows_is_decided_by_its_power_of_two(monkeypatch):
    asked = []
    monkeypatch.setattr(probe, "measure", lambda p, device: asked.append(p.rows) or probe.Timing(1.0, 0.5))
    model, _, _ = trained(network(), "srste", hardware="auto", steps=0)
    asked.clear()
    for rows in (30, 31, 32, 33, 100, 3, 70_000, 140_000):
        with torch.autocast("cpu", dtype=BF16):
            model[0](torch.randn(rows, 64))
    assert asked == [32, 64, 128, 16, 65_536]


def test_between_steps_nothing_is_computed_from_the_weights(kernels, monkeypatch):
    model, _, _ = trained(network(), "tmask", steps=0)
    x = torch.randn(24, 64)
    with torch.autocast("cpu", dtype=BF16):
        first = model(x)
        monkeypatch.setattr(type(nm(model[0]).told.method), "forward_weight", None)  # which would fail
        again = model(x)
    assert torch.equal(first, again)
    again.float().sum().backward()
    assert model[0].nm_notes["weight"].hardware.is_open
    assert all(p.grad is not None for p in model.parameters())
