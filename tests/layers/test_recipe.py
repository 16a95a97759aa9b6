"""A layer's recipe as bytes in its state_dict."""

import pytest
import torch

from nmgraph.layers.recipe import Recipe
from nmgraph.methods import METHODS, make_method
from nmgraph.methods.lbc import LBC
from nmgraph.methods.srste import SRSTE
from nmgraph.nm.pattern import Pattern


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_recipe_is_read_back_from_its_values(method, axis):
    recipe = Recipe(make_method(method), Pattern(1, 8), axis)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_recipe_says_itself_in_one_line_and_so_do_its_bytes():
    recipe = Recipe(SRSTE(decay=0.25), Pattern(1, 4))
    assert str(recipe) == "srste 1:4 (decay=0.25)"
    assert Recipe.describe_tensor(recipe.to_tensor()) == str(recipe)


def test_every_difference_shows_in_the_bytes():
    recipes = [
        Recipe(SRSTE(), Pattern(2, 4)),
        Recipe(SRSTE(decay=0.1), Pattern(2, 4)),
        Recipe(SRSTE(), Pattern(1, 4)),
        Recipe(SRSTE(), Pattern(2, 4), 0),
        Recipe(LBC(), Pattern(2, 4)),
    ]
    assert len({bytes(r.to_tensor().tolist()) for r in recipes}) == len(recipes)


@pytest.mark.parametrize("make", [lambda d: make_method("srste", {"decay": d}), SRSTE], ids=["by name", "configured"])
def test_equal_recipes_have_equal_bytes_however_their_numbers_were_written(make):
    whole, fraction = (Recipe(make(d), Pattern(2, 4)) for d in (0, 0.0))
    assert whole == fraction
    assert torch.equal(whole.to_tensor(), fraction.to_tensor())


def test_the_recipe_of_a_method_unknown_here_can_still_be_named():
    unknown = b'{"method": "bimask", "options": {"k": 100, "axis": "flat"}, "pattern": "2:4", "reduction_axis": 1}'
    assert Recipe.describe_tensor(torch.tensor(list(unknown), dtype=torch.uint8)) == "bimask 2:4 (k=100, axis=flat)"
