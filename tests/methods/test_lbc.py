"""Learning the best combination: what removal keeps to, whatever the gradients are."""

import itertools
import re

import pytest
import torch

from nmgraph.errors import MethodError
from nmgraph.methods import lbc
from nmgraph.methods.contract import Clock
from nmgraph.methods.lbc import LBC
from nmgraph.nm.grouping import blocks
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.packing import unpack_bits
from nmgraph.nm.pattern import Pattern

PATTERNS = ["1:2", "1:4", "2:4", "2:8", "4:8", "1:16", "3:8"]


def run(method, pattern, steps, *, shape=(3, 2, 16), learning_rate=0.1, dtype=torch.float32):
    """Give the state after every step of a run on random gradients."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(*shape, generator=generator, dtype=dtype)
    state, states = method.init(weight, pattern), []
    for step in range(steps):
        grad = torch.randn(*shape, generator=generator, dtype=dtype)
        state = method.update(weight, grad, state, pattern, Clock(step, steps, learning_rate)).state
        states.append(state)
    return states


def alive(state, pattern):
    return unpack_bits(state.alive, pattern.combinations)


@pytest.mark.parametrize("text", PATTERNS)
def test_all_combinations_live_and_no_weight_is_masked_at_the_start(text):
    pattern = Pattern.parse(text)
    state = LBC().init(torch.randn(3, 2, 16), pattern)
    assert alive(state, pattern).all()
    assert state.mask.all()


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("phase", [(0.0, 0.5), (0.2, 0.9), (0.0, 1.0)])
def test_exactly_as_many_combinations_live_as_the_schedule_says(text, phase):
    method, pattern = LBC(*phase), Pattern.parse(text)
    for step, state in enumerate(run(method, pattern, 20)):
        assert (alive(state, pattern).sum(-1) == pattern.combinations - method.removed((step + 1) / 20, pattern)).all()


@pytest.mark.parametrize("text", PATTERNS)
def test_a_removed_combination_never_comes_back(text):
    pattern = Pattern.parse(text)
    states = run(LBC(), pattern, 20)
    for before, after in itertools.pairwise(states):
        assert not (alive(after, pattern) & ~alive(before, pattern)).any()


@pytest.mark.parametrize("text", PATTERNS)
def test_the_mask_holds_the_members_of_living_combinations(text):
    pattern = Pattern.parse(text)
    holds_CM = lbc._members(pattern, torch.device("cpu"))[1][: pattern.m].T.bool()
    for state in run(LBC(), pattern, 12):
        held = (alive(state, pattern).unsqueeze(-1) & holds_CM).any(-2)
        assert torch.equal(blocks(state.mask, pattern.m), held)


@pytest.mark.parametrize("text", PATTERNS)
def test_one_combination_is_left_at_t_f_and_the_state_is_static_from_then_on(text):
    pattern = Pattern.parse(text)
    states = run(LBC(), pattern, 20)
    assert (alive(states[9], pattern).sum(-1) == 1).all()
    assert (blocks(states[9].mask, pattern.m).sum(-1) == pattern.n).all()
    assert (alive(states[8], pattern).sum(-1) > 1).all()
    for later in states[10:]:
        assert all(torch.equal(a, b) for a, b in zip(later, states[9], strict=True))


def test_the_state_stays_static_beyond_the_end_of_the_run():
    method, pattern = LBC(), Pattern(2, 4)
    weight, last = torch.randn(3, 2, 16), run(method, pattern, 20)[-1]
    for step, fresh in [(20, False), (21, True), (400, False)]:
        clock = Clock(step, 20, 0.1, fresh)
        state = method.update(weight, torch.randn(3, 2, 16), last, pattern, clock).state
        assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))


def test_a_schedule_made_longer_waits_and_revives_nothing():
    method, pattern, weight = LBC(), Pattern(2, 4), torch.randn(3, 2, 16)
    state = run(method, pattern, 20)[6]
    left = alive(state, pattern)
    for step, fresh in [(7, True), (8, False), (60, True)]:
        clock = Clock(step, 1000, 0.1, fresh)
        state = method.update(weight, torch.randn(3, 2, 16), state, pattern, clock).state
        assert torch.equal(alive(state, pattern), left)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_reach_the_pattern_too(steps):
    pattern = Pattern(2, 4)
    assert (blocks(run(LBC(), pattern, steps)[-1].mask, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("at", [0.1, 0.4, 1.0])
def test_a_phase_without_length_removes_all_at_once(at):
    states = run(LBC(t_i=at, t_f=at), Pattern(2, 4), 10)
    kept = [int(blocks(state.mask, 4).sum(-1).max()) for state in states]
    assert kept == [4] * (round(10 * at) - 1) + [2] * (11 - round(10 * at))


def test_a_phase_that_is_over_before_the_first_step_removes_all_in_it():
    method, pattern, weight = LBC(t_i=0.0, t_f=0.0), Pattern(2, 4), torch.randn(3, 2, 16)
    clock = Clock(0, 10, 0.1, fresh=True)
    state = method.update(weight, torch.randn(3, 2, 16), method.init(weight, pattern), pattern, clock).state
    assert (blocks(state.mask, 4).sum(-1) == 2).all()


def test_removal_looks_at_the_scores_and_not_at_the_weights():
    pattern = Pattern(2, 4)
    weight = torch.tensor([[[1.0, 5.0, 1.0, 5.0]]])
    grad = torch.tensor([[[-1.0, 1.0, -1.0, 1.0]]])  # growing weights 0 and 2 lowers the loss
    method, state = LBC(), LBC().init(weight, pattern)
    for step in range(4):
        state = method.update(weight, grad, state, pattern, Clock(step, 4, 0.1)).state
    assert state.mask.tolist() == [[[True, False, True, False]]]


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**7])
def test_the_ranking_does_not_depend_on_the_scale_of_the_learning_rate(scale):
    method, pattern = LBC(score_decay=0.0), Pattern(2, 4)
    usual, scaled = (run(method, pattern, 20, learning_rate=0.1 * s) for s in (1.0, scale))
    assert all(torch.equal(a.alive, b.alive) for a, b in zip(usual, scaled, strict=True))


def test_a_learning_rate_in_a_tensor_counts_as_the_number_does():
    usual, tensor = (run(LBC(), Pattern(2, 4), 10, learning_rate=rate) for rate in (0.1, torch.tensor(0.1)))
    assert all(torch.equal(a.alive, b.alive) for a, b in zip(usual, tensor, strict=True))
    assert all(torch.allclose(a.accumulator, b.accumulator) for a, b in zip(usual, tensor, strict=True))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("elements", [1, 1 << 9])
def test_removal_in_chunks_equals_removal_at_once(text, elements, monkeypatch):
    pattern = Pattern.parse(text)
    at_once = run(LBC(), pattern, 12)
    monkeypatch.setattr(lbc, "_CHUNK_ELEMENTS", elements)
    in_chunks = run(LBC(), pattern, 12)
    for one, other in zip(at_once, in_chunks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("text", PATTERNS)
def test_of_equal_scores_the_first_combination_survives(text):
    method, pattern, ones = LBC(), Pattern.parse(text), torch.ones(3, 2, 16)
    state = method.init(ones, pattern)
    for step in range(8):
        state = method.update(ones, ones, state, pattern, Clock(step, 8, 0.1)).state
    assert torch.equal(state.mask, (torch.arange(16) % pattern.m < pattern.n).expand(3, 2, 16))


@pytest.mark.parametrize("text", PATTERNS)
def test_a_block_that_never_gets_a_gradient_ends_at_its_largest_weights(text):
    method, pattern, weight = LBC(), Pattern.parse(text), torch.randn(3, 2, 16)
    grad = torch.randn(3, 2, 16)
    grad[1] = 0.0
    state = method.init(weight, pattern)
    for step in range(8):
        state = method.update(weight, grad, state, pattern, Clock(step, 8, 0.1)).state
    magnitude = magnitude_mask(weight, pattern)
    assert torch.equal(state.mask[1], magnitude[1])
    assert not torch.equal(state.mask[0], magnitude[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_at_least_float32_whatever_the_weight_is(dtype):
    state = run(LBC(), Pattern(2, 4), 4, dtype=dtype)[-1]
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert (state.accumulator.dtype, state.velocity.dtype) == (wanted, wanted)
    assert (state.alive.dtype, state.mask.dtype) == (torch.uint8, torch.bool)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_does_not_poison_the_scores(value):
    method, pattern, weight = LBC(), Pattern(2, 4), torch.randn(3, 2, 16)
    state = method.init(weight, pattern)
    bad = torch.randn(3, 2, 16)
    bad[1, 0, 5] = value
    state = method.update(weight, bad, state, pattern, Clock(0, 20, 0.1)).state
    assert torch.isfinite(state.accumulator).all()
    assert torch.isfinite(state.velocity).all()
    untouched = bad.clone()
    untouched[1, 0, 5] = 0.0
    clean = method.update(weight, untouched, method.init(weight, pattern), pattern, Clock(0, 20, 0.1)).state
    assert torch.equal(state.accumulator, clean.accumulator)


def test_update_changes_neither_the_state_nor_the_gradient_it_was_given():
    method, pattern = LBC(), Pattern(2, 4)
    weight, grad = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    state = method.init(weight, pattern)
    copies = [t.clone() for t in (weight, grad, *state)]
    method.update(weight, grad, state, pattern, Clock(5, 10, 0.1))
    assert all(torch.equal(a, b) for a, b in zip((weight, grad, *state), copies, strict=True))


def test_conclude_brings_an_unfinished_state_to_its_end():
    method, pattern, weight = LBC(), Pattern(2, 4), torch.randn(3, 2, 16)
    half_way = run(method, pattern, 20)[4]
    assert method.unfinished(weight, half_way, pattern) is not None
    concluded = method.conclude(weight, half_way, pattern)
    assert method.unfinished(weight, concluded, pattern) is None
    assert (blocks(concluded.mask, 4).sum(-1) == 2).all()
    assert not (alive(concluded, pattern) & ~alive(half_way, pattern)).any()


def test_conclude_goes_by_magnitude_where_no_score_has_moved():
    method, pattern, weight = LBC(), Pattern(2, 4), torch.randn(3, 2, 16)
    concluded = method.conclude(weight, method.init(weight, pattern), pattern)
    assert torch.equal(concluded.mask, magnitude_mask(weight, pattern))


def test_unfinished_counts_the_blocks_that_keep_too_many():
    method, pattern, weight = LBC(), Pattern(2, 4), torch.randn(300, 2, 16)
    said = method.unfinished(weight, method.init(weight, pattern), pattern)
    assert said == "2,400 of 2,400 blocks still keep more than 2 of 4"


@pytest.mark.parametrize("text", ["1:2", "2:4", "4:8", "1:16", "2:16", "3:16", "4:16", "1:32", "2:32"])
def test_patterns_of_few_combinations_are_supported(text):
    assert LBC().refusal(Pattern.parse(text)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "8:16",
            "lbc keeps track of every combination, and 8:16 has 12,870 of them (101 bytes per weight). "
            "Choose 4:16, or the method srste.",
        ),
        (
            "14:32",
            "lbc keeps track of every combination, and 14:32 has 471,435,600 of them (1,841,545 bytes per weight). "
            "Choose 2:32, or the method srste.",
        ),
    ],
)
def test_a_pattern_of_too_many_combinations_is_refused_with_the_nearest_choice(text, message):
    assert LBC().refusal(Pattern.parse(text)) == message


def test_the_refusal_reaches_the_user_with_the_layers_name():
    import nmgraph

    message = f"0: {LBC().refusal(Pattern(8, 16))}"
    with pytest.raises(MethodError, match=f"^{re.escape(message)}$"):
        nmgraph.convert(torch.nn.Sequential(torch.nn.Linear(16, 4)), method="lbc", pattern="8:16")
