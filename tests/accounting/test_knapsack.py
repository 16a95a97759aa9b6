"""The choice of one option per class, held to SciPy's integer programming."""

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from nmgraph.accounting import knapsack
from nmgraph.accounting.knapsack import choose


def least_harm(costs, harms, limit):
    """Ask HiGHS for the least harm, by integer programming."""
    sizes = [len(c) for c in costs]
    flat_costs, flat_harms = np.concatenate(costs), np.concatenate(harms)
    one_each = np.zeros((len(sizes), sum(sizes)))
    for i, end in enumerate(np.cumsum(sizes)):
        one_each[i, end - sizes[i] : end] = 1
    found = milp(
        flat_harms, integrality=np.ones(sum(sizes)), bounds=Bounds(0, 1), options={"mip_rel_gap": 1e-9},
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(flat_costs[None], -np.inf, limit)],
    )  # fmt: skip
    assert found.success, found.message
    return found.fun


def layers(draws, count, *, correlated):
    """Make layers of all sizes with dense, 2:4, 1:4, 1:8, 1:16; harm grows with what is removed, or is anything."""
    sizes = np.exp(draws.normal(0, 1.5, count))
    shares = np.array([1, 0.5, 0.25, 0.125, 0.0625])
    costs = sizes[:, None] * shares
    rising = np.sort(draws.exponential(1, (count, 5)) ** 3, axis=1)
    harms = costs[:, :1] - costs + draws.uniform(0, 0.05, (count, 5)) if correlated else rising
    harms[:, 0] = 0
    return costs, harms


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("count", [1, 3, 12, 40])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_no_choice_does_less_harm(count, share, correlated):
    for seed in range(2):
        costs, harms = layers(np.random.default_rng(seed), count, correlated=correlated)
        limit = share * costs[:, 0].sum()
        found = choose(costs, harms, limit)
        picked = np.arange(count), np.array(found.options)
        assert costs[picked].sum() <= limit * (1 + 1e-8)
        assert harms[picked].sum() == pytest.approx(found.harm)
        assert found.bound == found.harm
        assert found.harm == pytest.approx(least_harm(costs, harms, limit), rel=1e-6, abs=1e-6)


def test_a_thinned_search_stays_within_what_its_bound_says(monkeypatch):
    monkeypatch.setattr(knapsack, "STATES", 5)
    costs, harms = layers(np.random.default_rng(0), 30, correlated=True)
    limit = 0.4 * costs[:, 0].sum()
    found = choose(costs, harms, limit)
    assert costs[np.arange(30), np.array(found.options)].sum() <= limit * (1 + 1e-8)
    assert found.bound < found.harm
    assert found.bound <= least_harm(costs, harms, limit) + 1e-6 <= found.harm + 2e-6


def test_a_thinned_search_comes_to_an_end_where_every_choice_is_as_good(monkeypatch):
    monkeypatch.setattr(knapsack, "STATES", 2000)
    costs, _ = layers(np.random.default_rng(1), 100, correlated=False)
    limit = 0.4 * costs[:, 0].sum()
    found = choose(costs, costs[:, :1] - costs, limit)  # a sum of subsets
    assert found.bound <= found.harm <= found.bound * (1 + 1e-6)


def test_a_limit_that_is_met_exactly_is_met():
    costs = [[1.0, 0.5], [3.0, 1.5], [0.1, 0.05]]
    assert choose(costs, [[0, 1], [0, 1], [0, 1]], 0.5 * 4.1).options == (1, 1, 1)


def test_what_costs_nothing_is_left_as_it_is():
    assert choose([[0, 0, 0], [4, 2, 1]], [[0, 5, 9], [0, 1, 7]], 2).options == (0, 1)


def test_of_equal_harms_the_cheaper_one_is_taken():
    assert choose([[4, 2, 1]], [[0, 0, 0]], 4).options == (2,)


def test_what_is_too_much_for_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"the cheapest options cost 1\.5, more than 1"):
        choose([[2, 1], [1, 0.5]], [[0, 1], [0, 1]], 1)
