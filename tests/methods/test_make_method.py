"""A method from a name and options: what is accepted, and what each mistake is told."""

import re

import pytest

from nmgraph.errors import MethodError
from nmgraph.methods import METHODS, make_method
from nmgraph.methods.lbc import LBC
from nmgraph.methods.srste import SRSTE


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made_by_its_name_with_the_defaults_of_its_paper(name):
    assert make_method(name) == METHODS[name]()
    assert make_method(name).name == name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made_again_from_its_own_options(name):
    assert make_method(name, make_method(name).options()) == METHODS[name]()


def test_options_reach_the_method():
    assert make_method("lbc", {"t_f": 0.25, "momentum": 0.5}) == LBC(t_f=0.25, momentum=0.5)


def test_a_whole_number_does_for_a_float():
    assert make_method("srste", {"decay": 0}) == SRSTE(decay=0.0)


def test_a_configured_method_passes_through():
    method = SRSTE(decay=0.1)
    assert make_method(method) is method


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("srst", {}, "there is no method 'srst'. Did you mean srste or sste? See `nmgraph methods`."),
        (
            "zzz",
            {},
            "there is no method 'zzz'. It knows asp, bame, bimask, decaying-mask, gradual, lbc, maxq, rigl, srste, sste, static, tmask. See `nmgraph methods`.",
        ),
        (
            "LBC",
            {},
            "there is no method 'LBC'. It knows asp, bame, bimask, decaying-mask, gradual, lbc, maxq, rigl, srste, sste, static, tmask. See `nmgraph methods`.",
        ),
        ("srste", {"dekay": 0.1}, "srste has no option 'dekay'. Did you mean decay?"),
        ("lbc", {"lambda": 0.1}, "lbc has no option 'lambda'. It knows t_i, t_f, momentum, score_decay, criterion."),
        ("srste", {"decay": "0.1"}, "srste: decay='0.1' should be a float, like 0.0002."),
        ("srste", {"decay": None}, "srste: decay=None should be a float, like 0.0002."),
        ("srste", {"decay": True}, "srste: decay=True should be a float, like 0.0002."),
        ("lbc", {"t_f": [0.5]}, "lbc: t_f=[0.5] should be a float, like 0.5."),
        (
            SRSTE(decay=0.1),
            {"decay": 0.2},
            "SRSTE(decay=0.1, t_i=0.0, t_f=0.0, curve='cubic') is configured already, so decay can't be set beside it. "
            "Set them where it is made: SRSTE(decay=...).",
        ),
        (
            LBC(),
            {"t_i": 0.2, "t_f": 0.4},
            "LBC(t_i=0.0, t_f=0.5, momentum=0.9, score_decay=0.0005, criterion='score') is configured already, so "
            "t_i, t_f can't be set beside it. Set them where it is made: LBC(t_i=..., t_f=...).",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(method, options, message):
    with pytest.raises(MethodError, match=f"^{re.escape(message)}$"):
        make_method(method, options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SRSTE(decay=-1.0), "srste: decay=-1.0 must be 0 or more; the paper's is 2e-4."),
        (lambda: SRSTE(decay=float("inf")), "srste: decay=inf must be 0 or more; the paper's is 2e-4."),
        (lambda: SRSTE(decay=float("nan")), "srste: decay=nan must be 0 or more; the paper's is 2e-4."),
        (lambda: LBC(momentum=1.0), "lbc: momentum=1.0 must lie in [0, 1); the paper's is 0.9."),
        (lambda: LBC(momentum=-0.1), "lbc: momentum=-0.1 must lie in [0, 1); the paper's is 0.9."),
        (lambda: LBC(score_decay=-1.0), "lbc: score_decay=-1.0 must be 0 or more; the paper's is 5e-4."),
        (
            lambda: LBC(t_i=0.6),
            "lbc: t_i=0.6 and t_f=0.5 are fractions of all steps, so 0 <= t_i <= t_f <= 1 must hold.",
        ),
    ],
)
def test_a_method_with_a_value_out_of_range_cannot_be_made(make, message):
    with pytest.raises(MethodError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    cls = METHODS[name]
    said = (cls.name, cls.title, cls.paper, cls.gradient, cls.state_cost, cls.time_cost)
    assert all(isinstance(text, str) and text for text in said)
    assert cls.__dataclass_params__.frozen
