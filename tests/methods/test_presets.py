"""Published settings by name."""

import pytest
from handles import nm
from models import deit, mlp

import nmgraph
from nmgraph.errors import MethodError
from nmgraph.methods import METHODS, find_preset, make_method
from nmgraph.methods.lbc import LBC

BETTER = {"bimask": {"search": "swap", "objective": "kept"}, "bame": {"search": "swap"}}
PRESETS = [(name, preset) for name, cls in METHODS.items() for preset in cls.presets]


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_every_preset_makes_its_method_and_says_how_to_train(method, preset):
    published = find_preset(method, preset)
    made = make_method(method, dict(published.options))
    assert {key: made.options()[key] for key in published.options} == dict(published.options)
    assert published.training
    assert published.block_axis in ("channels", "flat")
    assert set(published.keep_dense) <= {"stem", "head"}


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_of_a_method_are_those_of_its_paper_but_for_what_does_better(method):
    published = METHODS[method].presets["paper"]
    ours = BETTER.get(method, {})
    assert make_method(method, {**published.options, **ours}) == METHODS[method]()
    assert all(published.options[option] != value for option, value in ours.items())


def test_a_preset_sets_options_and_layers_kept_dense():
    model = nmgraph.convert(deit(), method="lbc", preset="code")
    assert nm(model.blocks[0].mlp.fc1).told.method == LBC(score_decay=1e-4)
    assert [e.name for e in nmgraph.manifest(model).skipped] == ["patch_embed.proj", "head"]


def test_what_is_given_beside_it_counts_more():
    model = nmgraph.convert(mlp(), method="bimask", preset="code", keep_dense=(), block_axis="channels", candidates=7)
    method = nm(model[0]).told.method
    assert (method.candidates, method.objective) == (7, "kept")
    assert nmgraph.manifest(model).skipped == ()


def test_unknown_presets_are_refused_with_those_there_are():
    with pytest.raises(MethodError, match=r"^lbc has no preset 'papers'\. Did you mean paper\?"):
        nmgraph.convert(mlp(), method="lbc", preset="papers")


def test_a_configured_method_takes_no_preset():
    with pytest.raises(MethodError, match=r"is configured already, so the preset 'paper' can't be set"):
        nmgraph.convert(mlp(), method=LBC(), preset="paper")


def test_a_name_given_as_a_string_is_one_name_and_not_its_letters():
    manifest = nmgraph.manifest(nmgraph.convert(deit(), method="lbc", skip="blocks.0.*", keep_dense="head"))
    assert {e.name.split(".")[0] for e in manifest.skipped} == {"patch_embed", "blocks", "head"}
