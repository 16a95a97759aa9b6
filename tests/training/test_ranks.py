"""Several processes train as one does: the same masks on each at every step, and the same weights at the end."""

from itertools import product

import pytest
import torch
from ranks import on_ranks
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from variants import VARIANTS

import nmgraph
from nmgraph.errors import NMGraphError
from nmgraph.layers.masked import masked_weights

STEPS = 10
BATCH = 8


def network(variant, pattern="2:4", seed=0):
    """Give a converted network, in float64, so that the order of a sum decides no mask."""
    torch.manual_seed(seed)
    method, options = VARIANTS[variant]
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 6)
    )
    return nmgraph.convert(net.double(), method=method, pattern=pattern, **options)


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 8, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(6, (BATCH,), generator=generator)


def train(model, optimizer, rank=0, world=1, steps=range(STEPS), each=lambda: None):
    for step in steps:
        x, y = (t[rank::world] for t in batch_of(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        each()


def alone(variant, make):
    model = network(variant)
    optimizer = make(model.parameters())
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer)
    return model


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def gathered(state):
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def require_equal(state, wanted):
    state = {name.removeprefix("module."): tensor for name, tensor in gathered(state).items()}
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(state[name], tensor, rtol=1e-6, atol=1e-12), name


def ddp_equals_one(rank, world, variants, makes):
    for place, (variant, make) in enumerate(product(variants, makes)):
        model = network(variant)
        optimizer = make(model.parameters())
        if place % 2:
            model = DistributedDataParallel(model, broadcast_buffers=False)
            controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
        else:  # to attach to what is inside, before it is wrapped, is as good
            controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
            model = DistributedDataParallel(model)
        train(model, optimizer, rank, world, each=controller.check_ranks)
        require_equal(model.state_dict(), alone(variant, make).state_dict())
        assert nmgraph.verify(nmgraph.finalize(model)).holds


def fsdp_equals_one(rank, world, variants, makes):
    for variant in variants:
        for make in makes:
            model = network(variant)
            for layer in model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            fully_shard(model)
            optimizer = make(model.parameters())
            controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
            for name, weight in masked_weights(model).items():
                for field, tensor in weight.state._asdict().items():
                    assert isinstance(tensor, DTensor) == (tensor.dim() >= 3), f"{name}: {field}"
            train(model, optimizer, rank, world, each=controller.check_ranks)
            require_equal(model.state_dict(), alone(variant, make).state_dict())


kinds = pytest.mark.parametrize("train_on", [ddp_equals_one, fsdp_equals_one], ids=["ddp", "fsdp2"])


@kinds
def test_two_ranks_train_as_one_process_does(train_on):
    on_ranks(2, train_on, list(VARIANTS), [sgd])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@kinds
def test_ranks_train_as_one_process_does_under_two_optimizers(train_on, world):
    on_ranks(world, train_on, list(VARIANTS), [adamw, sgd])


FEW = ["lbc", "bimask", "rigl"]  # with scores; with a backward weight; with decisions across blocks


def narrow(variant):
    """Give a network of which some of four ranks hold nothing: three rows make parts of one, one, one and none."""
    torch.manual_seed(0)
    method, options = VARIANTS[variant]
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    return nmgraph.convert(net.double(), method=method, pattern="2:4", **options)


def ranks_without_rows(rank, world, variants):
    for variant in variants:
        models = [narrow(variant), fully_shard(narrow(variant))]
        for place, model in enumerate(models):
            optimizer = adamw(model.parameters())
            nmgraph.attach(model, optimizer, total_steps=STEPS)
            for step in range(STEPS):
                x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                optimizer.zero_grad()
                (model(x[rank::world]) if place else model(x)).square().mean().backward()
                optimizer.step()
        require_equal(models[1].state_dict(), models[0].state_dict())


def test_a_rank_may_hold_no_row_of_a_weight():
    on_ranks(4, ranks_without_rows, FEW)


def accumulating(rank, world, variants):
    for variant in variants:
        model = DistributedDataParallel(network(variant))
        optimizer = sgd(model.parameters())
        controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
        for step in range(STEPS):
            x, y = (t[rank::world] for t in batch_of(step))
            half = len(x) // 2
            optimizer.zero_grad()
            with model.no_sync():
                (F.cross_entropy(model(x[:half]), y[:half]) / 2).backward()
            (F.cross_entropy(model(x[half:]), y[half:]) / 2).backward()
            optimizer.step()
            controller.check_ranks()
        require_equal(model.state_dict(), alone(variant, sgd).state_dict())


def test_gradients_accumulated_without_sync_count_as_one_step():
    on_ranks(2, accumulating, FEW)


def ranks_apart(rank, world):
    model = network("asp", seed=rank)  # the seed was forgotten, and DDP is told to leave buffers alone
    model = DistributedDataParallel(model, broadcast_buffers=False)
    controller = nmgraph.attach(model, sgd(model.parameters()), total_steps=STEPS)
    with pytest.raises(
        NMGraphError, match=r"module.0: its mask on the processes \[1\] is not that of process 0\. Start"
    ):
        controller.check_ranks()


def test_masks_that_differ_between_ranks_are_found():
    on_ranks(2, ranks_apart)


def test_one_process_agrees_with_itself():
    model = network("lbc")
    nmgraph.attach(model, sgd(model.parameters()), total_steps=STEPS).check_ranks()


def hybrid(rank, world, variants):
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    for variant in variants:
        model = fully_shard(network(variant), mesh=mesh)
        optimizer = sgd(model.parameters())
        controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
        train(model, optimizer, rank, world, each=controller.check_ranks)
        require_equal(model.state_dict(), alone(variant, sgd).state_dict())


def test_copies_of_shards_train_as_one_process_does():
    on_ranks(4, hybrid, FEW)


def tensor_parallel(rank, world, variants):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = distributed.device_mesh.init_device_mesh("cpu", (world,))
    for variant in variants:
        model = network(variant)
        parallelize_module(model, mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, foreach=False)
        controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
        train(model, optimizer, each=controller.check_ranks)
        require_equal(model.state_dict(), alone(variant, sgd).state_dict())


def test_tensor_parallel_weights_train_as_one_process_does():
    on_ranks(2, tensor_parallel, [*FEW, "maxq"])


@pytest.mark.slow
def test_tensor_parallel_weights_of_every_method_train_as_one_process_does():
    on_ranks(2, tensor_parallel, list(VARIANTS))


def language_model(method):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return nmgraph.convert(LlamaForCausalLM(config).double(), method=method)


def of_layers(rank, world, methods):
    for method in methods:
        models = [language_model(method), language_model(method)]
        models[1].gradient_checkpointing_enable({"use_reentrant": False})
        for layer in models[1].model.layers:
            fully_shard(layer)
        fully_shard(models[1])
        for place, model in enumerate(models):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            nmgraph.attach(model.train(), optimizer, total_steps=4)
            for step in range(4):
                tokens = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(step))
                tokens = tokens[rank::world] if place else tokens
                optimizer.zero_grad()
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
        require_equal(models[1].state_dict(), models[0].state_dict())


def test_a_language_model_sharded_by_layers_and_checkpointed_trains_as_a_whole_one_does():
    on_ranks(2, of_layers, ["bimask"])
