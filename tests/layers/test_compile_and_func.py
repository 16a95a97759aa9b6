"""Converted networks under torch.compile and torch.func."""

import pytest
import torch
from torch import fx, nn
from torch.func import functional_call, grad, vmap

import nmgraph
from nmgraph.methods import METHODS

both = pytest.mark.parametrize("method", METHODS)


def network(method):
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 4))
    return nmgraph.convert(net, method=method)


def trained(method, steps):
    """Take a few real steps, so that LBC's masks are not all ones."""
    model = network(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.attach(model, optimizer, total_steps=8)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8, 4, 4)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@both
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_converted_network_compiles_without_a_graph_break_and_equals_eager(method, backend):
    model, x = trained(method, 2), torch.randn(4, 8, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for mode in (model.train, model.eval):
        mode()
        assert torch.equal(compiled(x), model(x))


@both
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_network_has_the_gradients_of_eager(method):
    model, x = trained(method, 2), torch.randn(4, 8, 4, 4)
    model(x).square().mean().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    assert all(torch.allclose(p.grad, w, atol=1e-6) for p, w in zip(model.parameters(), wanted, strict=True))


@both
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_network_trains_to_the_pattern_without_compiling_again(method):
    model = network(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    nmgraph.attach(model, optimizer, total_steps=12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(12):
            optimizer.zero_grad()
            compiled(torch.ones(4, 8, 4, 4)).square().mean().backward()
            optimizer.step()
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@both
def test_functional_call_uses_the_parameters_it_is_given(method):
    model, x = trained(method, 2), torch.randn(4, 8, 4, 4)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    answer = functional_call(model, doubled, (x,))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(answer, model(x))


@both
def test_functional_gradients_equal_autograd(method):
    model, x = trained(method, 2), torch.randn(4, 8, 4, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    grads = grad(lambda p: functional_call(model, p, (x,)).square().mean())(parameters)
    model(x).square().mean().backward()
    assert all(torch.allclose(grads[name], p.grad, atol=1e-6) for name, p in model.named_parameters())


@both
def test_gradients_per_sample_equal_a_loop(method):
    model, x = trained(method, 2), torch.randn(4, 8, 4, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p, sample):
        return functional_call(model, p, (sample.unsqueeze(0),)).square().mean()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        alone = grad(loss)(parameters, sample)
        assert all(torch.allclose(together[name][i], g, atol=1e-6) for name, g in alone.items())


@both
def test_an_ensemble_under_vmap_equals_its_members(method):
    members, x = [trained(method, 2) for _ in range(3)], torch.randn(4, 8, 4, 4)
    parameters, buffers = torch.func.stack_module_state(members)
    together = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(parameters, buffers)
    assert torch.allclose(together, torch.stack([m(x) for m in members]), atol=1e-5)


@both
def test_gradients_of_an_ensemble_equal_those_of_its_members(method):
    members, x = [network(method) for _ in range(3)], torch.randn(4, 8, 4, 4)
    parameters, buffers = torch.func.stack_module_state(members)
    loss = lambda p, b: functional_call(members[0], (p, b), (x,)).square().mean()  # noqa: E731
    for _ in range(2):  # twice, as watching for training begins with the second
        grads = vmap(grad(loss))(parameters, buffers)
    for i, member in enumerate(members):
        member(x).square().mean().backward()
        assert all(torch.allclose(grads[name][i], p.grad, atol=1e-6) for name, p in member.named_parameters())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("method", ["srste", "bimask"])
def test_in_a_compiled_network_masks_are_one_node_and_not_a_sort(method):
    nodes = []

    def backend(graph, inputs):
        parts = [part for part in graph.modules() if isinstance(part, fx.GraphModule)]  # of autograd functions, too
        nodes.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return graph

    model, x = trained(method, 2), torch.randn(4, 8, 4, 4)
    assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))
    assert any("blockwise" in node for node in nodes)
    assert method == "bimask" or not any("sort" in node for node in nodes)  # bimask inverts its permutation by a sort


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@both
def test_a_network_compiled_by_inductor_has_the_outputs_and_gradients_of_eager(method):
    model, x = trained(method, 2), torch.randn(4, 8, 4, 4)
    model(x).square().mean().backward()
    wanted = [model(x), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    compiled(x).square().mean().backward()
    found = [compiled(x), *(p.grad for p in model.parameters())]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
