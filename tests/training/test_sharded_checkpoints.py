"""A sharded run is saved in parts, and goes on with as many processes as there are then."""

import pytest
import torch
from ranks import on_ranks
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training.test_ranks import FEW, STEPS, adamw, alone, batch_of, network, require_equal, sgd, train
from variants import VARIANTS

import nmgraph
from nmgraph.errors import NMGraphError

HALF = STEPS // 2


def started(variant, shards):
    model = network(variant, seed=int(shards) + 7)  # what it is loaded into has other weights
    if shards:
        fully_shard(model)
    optimizer = adamw(model.parameters())
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    return model, optimizer


def save_halfway(rank, world, variants, folder):
    for place, variant in enumerate(variants):
        model = network(variant)
        fully_shard(model)
        optimizer = adamw(model.parameters())
        nmgraph.attach(model, optimizer, total_steps=STEPS)
        train(model, optimizer, rank, world, range(HALF))
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(states, checkpoint_id=str(folder / str(place)))


def go_on(rank, world, variants, folder, shards=True):
    for place, variant in enumerate(variants):
        model, optimizer = started(variant, shards)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=str(folder / str(place)))
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        train(model, optimizer, rank, world, range(HALF, STEPS))
        require_equal(model.state_dict(), alone(variant, adamw).state_dict())


def go_on_from_nothing(rank, world, variants, folder):
    for place, variant in enumerate(variants):
        with torch.device("meta"):
            model = network(variant)
        fully_shard(model)
        model.to_empty(device="cpu")
        for name, tensor in model.state_dict().items():
            whole = tensor.dim() < 2 or name.endswith("permutation")
            assert whole or tensor.to_local().shape[0] * world == tensor.shape[0], name
        optimizer = adamw(model.parameters())
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=str(folder / str(place)))
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        nmgraph.attach(model, optimizer, total_steps=STEPS)
        train(model, optimizer, rank, world, range(HALF, STEPS))
        require_equal(model.state_dict(), alone(variant, adamw).state_dict())


def test_a_model_made_without_memory_is_sharded_and_goes_on(tmp_path):
    on_ranks(2, save_halfway, FEW, tmp_path)
    on_ranks(2, go_on_from_nothing, FEW, tmp_path)


def test_a_run_saved_on_two_ranks_goes_on_with_one_and_with_four(tmp_path):
    on_ranks(2, save_halfway, FEW, tmp_path)
    go_on(0, 1, FEW, tmp_path, shards=False)
    on_ranks(4, go_on, FEW, tmp_path)


@pytest.mark.slow
def test_every_method_goes_on_with_another_number_of_ranks(tmp_path):
    on_ranks(2, save_halfway, list(VARIANTS), tmp_path)
    go_on(0, 1, list(VARIANTS), tmp_path, shards=False)
    on_ranks(4, go_on, list(VARIANTS), tmp_path)


def gather_and_finish(rank, world, folder):
    model = network("lbc")
    fully_shard(model)
    optimizer = sgd(model.parameters())
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, rank, world)
    for call in (nmgraph.finalize, lambda m: nmgraph.save(m, folder / "m.nm.pt")):
        with pytest.raises(NMGraphError, match=r"is a DTensor, sharded over processes.*full_state_dict=True"):
            call(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        complete = network("lbc", seed=3)
        complete.load_state_dict(state)
        assert nmgraph.verify(nmgraph.finalize(complete)).holds


def test_a_sharded_model_is_gathered_to_be_finalized(tmp_path):
    on_ranks(2, gather_and_finish, tmp_path)


def in_bfloat16(rank, world):
    model = network("srste").float()
    for name in ("bimask", "lbc"):
        model = network(name).float()
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        optimizer = sgd(model.parameters())
        controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
        before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
        for step in range(STEPS):
            x = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(step * world + rank))
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()
            controller.check_ranks()
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter.full_tensor(), before[name]), name


def test_it_trains_with_mixed_precision_and_float32_shards():
    on_ranks(2, in_bfloat16)


def refused(rank, world):
    from transformers.pytorch_utils import Conv1D

    cpu = torch.device("cpu")
    with pytest.raises(RuntimeError, match=r"0: its weight was taken away.*FullyShardedDataParallel.*fully_shard"):
        FSDP1(nmgraph.convert(nn.Sequential(nn.Linear(16, 16))), use_orig_params=True, device_id=cpu)
    with pytest.raises(RuntimeError, match=r"unflattened parameter: _fsdp_wrapped_module.0.weight"):  # torch's own
        FSDP1(nmgraph.convert(nn.Sequential(nn.Linear(16, 16))), use_orig_params=False, device_id=cpu)
    apart = nmgraph.convert(nn.Sequential(Conv1D(16, 12)), method="lbc")  # 12 input channels in parts of 6
    fully_shard(apart)
    with pytest.raises(
        NMGraphError, match=r"0: its weight \[12, 16\] is sharded along axis 0 into 2 parts, which cuts"
    ):
        nmgraph.attach(apart, sgd(apart.parameters()), total_steps=STEPS)
    whole = nmgraph.convert(nn.Sequential(Conv1D(16, 16)), method="lbc")
    fully_shard(whole)
    nmgraph.attach(whole, sgd(whole.parameters()), total_steps=STEPS).check_ranks()


def test_what_cuts_blocks_or_flattens_weights_is_refused():
    on_ranks(2, refused)


def sharded_late(rank, world):
    model = network("lbc")
    optimizer = sgd(model.parameters())
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    fully_shard(model)
    import logging

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("nmgraph").addHandler(handler)
    train(model, optimizer, rank, world, range(2))
    logging.getLogger("nmgraph").removeHandler(handler)
    assert [text for text in said if "the optimizer does not hold its weight any more" in text]


def test_a_model_sharded_after_attach_is_said():
    on_ranks(2, sharded_late)


def evaluated_first(rank, world):
    model = fully_shard(network("lbc"))
    optimizer = sgd(model.parameters())
    model.eval()(batch_of(0)[0])  # leaves the root's parameters whole
    nmgraph.attach(model.train(), optimizer, total_steps=STEPS)
    train(model, optimizer, rank, world)
    require_equal(model.state_dict(), alone("lbc", sgd).state_dict())


def test_a_sharded_model_may_be_evaluated_before_it_is_attached():
    on_ranks(2, evaluated_first)


def both_kinds(rank, world, variants):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for variant in variants:
        model = network(variant)
        parallelize_module(model, mesh["tp"], {"3": ColwiseParallel(), "5": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, foreach=False)
        controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
        train(model, optimizer, rank // 2, 2, each=controller.check_ranks)
        require_equal(model.state_dict(), alone(variant, sgd).state_dict())


def test_shards_of_tensor_parallel_weights_train_as_one_process_does():
    on_ranks(4, both_kinds, FEW)
