"""Draws that depend on a seed, a weight and a step, and on nothing else."""

import itertools

import torch

from nmgraph.nm.randomness import generator, seed_of


def draws(seed, step=0):
    return torch.rand(8, generator=generator(seed, step))


def test_the_same_seed_and_weight_draw_the_same():
    weight = torch.randn(8, 1, 16)
    assert torch.equal(draws(seed_of(weight, 3), 7), draws(seed_of(weight.clone(), 3), 7))


def test_another_seed_weight_shape_or_step_draws_something_else():
    weight = torch.zeros(8, 1, 16)
    nudged = weight.clone()
    nudged[0, 0, 5] = 1e-6
    seen = [
        draws(seed_of(weight, 0), 0),
        draws(seed_of(weight, 0), 1),
        draws(seed_of(weight, 0), -1),
        draws(seed_of(weight, 1), 0),
        draws(seed_of(nudged, 0), 0),
        draws(seed_of(weight.reshape(16, 1, 8), 0), 0),
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_every_process_and_every_release_draws_alike():
    weight = torch.arange(8.0).reshape(2, 1, 4)
    assert int(seed_of(weight, 0)) == 3821498974
    assert torch.randperm(8, generator=generator(torch.tensor(12345), 100)).tolist() == [7, 4, 1, 0, 5, 3, 6, 2]


def test_a_seed_fits_into_model_state():
    seed = seed_of(torch.randn(4, 1, 4), 0)
    assert (seed.dtype, seed.shape, seed.device.type) == (torch.int64, (), "cpu")
    assert 0 <= int(seed) < 2**32


def test_steps_never_share_their_draws_whatever_their_sign():
    seed = seed_of(torch.randn(4, 1, 4), 0)
    firsts = [tuple(torch.randperm(64, generator=generator(seed, step)).tolist()) for step in range(-200, 200)]
    assert len(set(firsts)) == 400


def test_the_largest_and_the_smallest_seed_give_a_generator():
    for seed, step in itertools.product((0, 2**32 - 1), (-(10**9), -1, 0, 10**9)):
        assert draws(torch.tensor(seed), step).shape == (8,)


def test_the_memory_format_does_not_count():
    weight = torch.randn(8, 4, 3, 3)
    assert seed_of(weight, 0) == seed_of(weight.to(memory_format=torch.channels_last), 0)


def test_a_bfloat16_weight_counts_by_its_values():
    weight = torch.randn(8, 1, 16).bfloat16()
    assert seed_of(weight, 0) == seed_of(weight.float(), 0)
    assert seed_of(weight, 0) != seed_of(-weight, 0)


def test_a_weight_that_is_trained_or_not_finite_gives_a_seed():
    weight = torch.full((4, 1, 4), torch.nan, requires_grad=True)
    assert seed_of(weight, 0) == seed_of(weight.detach(), 0)
    assert not seed_of(weight, 0).requires_grad


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draws(seed_of(torch.ones(4, 1, 4), 0), 5)
    assert torch.equal(torch.get_rng_state(), before)
