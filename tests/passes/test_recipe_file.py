"""Recipes as files: what is written is read again, and what can't be one is said."""

import inspect
import json

import pytest
import torch
from models import mlp

import nmgraph
from nmgraph.errors import FileError, MethodError
from nmgraph.passes.recipe_file import RecipeFile, read_recipe

EVERYTHING = RecipeFile(
    method="bame", options={"interval": 20, "bidirectional": True}, preset="paper", pattern="1:4", layers={"a.*": "2:4", "b[[]0]": "1:8"},
    skip=["c"], include=["d", "é*"], keep_dense=["stem"], block_axis="flat", permute_channels=True, mode="graph",
)  # fmt: skip


@pytest.mark.parametrize("recipe", [RecipeFile(), EVERYTHING, RecipeFile(keep_dense=[])])
def test_what_is_written_is_read_again(recipe, tmp_path):
    recipe.write(tmp_path / "r.json")
    assert read_recipe(tmp_path / "r.json") == recipe
    assert json.loads((tmp_path / "r.json").read_text())["nmgraph_recipe"] == 1


def test_the_shortest_recipe_is_what_convert_does_anyway(tmp_path):
    (tmp_path / "r.json").write_text('{"nmgraph_recipe": 1}')
    assert read_recipe(tmp_path / "r.json") == RecipeFile()
    usual = {name: p.default for name, p in inspect.signature(nmgraph.convert).parameters.items()}
    given = {name: value or None for name, value in RecipeFile().arguments().items()}
    assert given == {name: usual[name] or None for name in given}


def test_a_recipe_has_all_that_convert_takes_but_inputs_objects_and_what_is_the_machines():
    taken = inspect.signature(nmgraph.convert).parameters.keys()
    left_away = {"model", "example_inputs", "tracer", "concrete_args", "progress", "method_options", "hardware"}
    assert RecipeFile().arguments().keys() == taken - left_away


def test_convert_takes_what_a_recipe_gives():
    told = RecipeFile(method="gradual", options={"interval": 7}, pattern="1:4", layers={"2": "1:8"})
    model = nmgraph.convert(mlp(), **told.arguments())
    assert [(e.name, e.pattern) for e in nmgraph.manifest(model).converted] == [("0", "1:4"), ("2", "1:8")]
    assert nmgraph.manifest(model).method == "gradual"


@pytest.mark.parametrize("name", ["pattern", "model", "progress", "t"])
def test_options_are_the_methods_own_and_no_other_arguments(name):
    with pytest.raises(MethodError, match=f"lbc has no option {name!r}"):
        RecipeFile(options={name: "1:4"}).arguments()


def test_what_is_given_beside_a_recipe_counts_more():
    own = RecipeFile(
        options={"t_f": 0.7}, layers={"a": "1:4", "*": "2:4"}, skip=["x"], include=["y"], keep_dense=["stem"]
    )
    given = {"pattern": "1:8", "options": {"t_i": 0.1}, "layers": {"a": "1:16"}, "skip": ["z"], "keep_dense": []}
    assert own.with_more(given) == RecipeFile(
        pattern="1:8", options={"t_f": 0.7, "t_i": 0.1}, layers={"*": "2:4", "a": "1:16"}, skip=["x", "z"], include=["y"], keep_dense=[],
    )  # fmt: skip
    assert list(own.with_more(given).layers) == ["*", "a"]  # the last that matches counts
    assert own.with_more({}) == own


def test_another_method_leaves_the_options_of_the_recipes_method_behind():
    own = RecipeFile(method="lbc", options={"t_f": 0.7}, preset="paper", pattern="1:4")
    assert own.with_more({"method": "srste", "options": {"decay": 0.1}}) == RecipeFile(
        method="srste", options={"decay": 0.1}, pattern="1:4"
    )
    assert own.with_more({"method": "lbc"}) == own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no recipe: it can't be read as JSON (Expecting value: line 1 column 1 (char 0))."),
        ("[" * 100_000, "is no recipe: it can't be read as JSON (maximum recursion depth exceeded"),
        ("[1]", 'is no recipe. It has to be a JSON object that begins with "nmgraph_recipe": 1.'),
        ('{"method": "lbc"}', 'is no recipe. It has to be a JSON object that begins with "nmgraph_recipe": 1.'),
        ('{"nmgraph_recipe": 2}', "is a recipe of version 2, and this nmgraph reads up to 1. Update nmgraph."),
        ('{"nmgraph_recipe": true}', ': "nmgraph_recipe" is True; it has to be 1.'),
        ('{"nmgraph_recipe": "1"}', ": \"nmgraph_recipe\" is '1'; it has to be 1."),
        ('{"nmgraph_recipe": 1, "layer": {}}', ": a recipe has no key 'layer'. Did you mean 'layers'?"),
        ('{"nmgraph_recipe": 1, "zzz": 1}', ": a recipe has no key 'zzz'. It knows block_axis, include, keep_dense, layers, method, mode, options, pattern, permute_channels, preset, skip."),
        ('{"nmgraph_recipe": 1, "skip": "head"}', ": 'skip' is \"head\"; it has to be a list of globs, such as [\"head\", \"blocks.0.*\"]."),
        ('{"nmgraph_recipe": 1, "layers": ["a"]}', ": 'layers' is [\"a\"]; it has to be an object of patterns by glob, such as {\"blocks.*\": \"1:4\"}."),
        ('{"nmgraph_recipe": 1, "permute_channels": 1}', ": 'permute_channels' is 1; it has to be true or false."),
        ('{"nmgraph_recipe": 1, "mode": "fast"}', ": 'mode' is \"fast\"; it has to be \"auto\" or \"graph\"."),
        ('{"nmgraph_recipe": 1, "mode": []}', ": 'mode' is []; it has to be \"auto\" or \"graph\"."),
        ('{"nmgraph_recipe": 1, "options": {"t_f": [1]}}', ": 'options' is {\"t_f\": [1]}; it has to be an object of the method's options, such as {\"t_f\": 0.5}."),
        ('{"nmgraph_recipe": 1, "pattern": "4:2"}', ": pattern 4:2 keeps 4 of every 2 weights, which removes nothing. Did you mean 2:4?"),
        ('{"nmgraph_recipe": 1, "layers": {"a": "two"}}', ": 'two' is not a pattern. Write N:M, for example 2:4 (keep 2 of every 4)."),
        ('{"nmgraph_recipe": 1, "skip": [], "skip": []}', "is no recipe: it can't be read as JSON ('skip' stands there twice)."),
        ('{"nmgraph_recipe": 1, "options": {"t_f": NaN}}', "is no recipe: it can't be read as JSON (NaN is no number)."),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_said(text, message, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(FileError) as raised:
        read_recipe(path)
    assert str(raised.value).removeprefix(str(path)).strip().startswith(message)


def test_a_recipe_that_is_not_there_or_not_text_is_said(tmp_path):
    with pytest.raises(FileError, match=r"r\.json does not exist\.$"):
        read_recipe(tmp_path / "r.json")
    with pytest.raises(FileError, match=r"can't be read: Is a directory\.$"):
        read_recipe(tmp_path)
    torch.save(mlp(), tmp_path / "net.pt")
    with pytest.raises(FileError, match=r"is no recipe: it can't be read as JSON \('utf-8' codec"):
        read_recipe(tmp_path / "net.pt")


def test_an_editors_mark_at_the_beginning_is_no_harm(tmp_path):
    (tmp_path / "r.json").write_bytes(b'\xef\xbb\xbf{"nmgraph_recipe": 1}')
    assert read_recipe(tmp_path / "r.json") == RecipeFile()


def test_an_earlier_recipe_is_kept_unless_it_may_be_replaced(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("mine")
    with pytest.raises(FileError, match="exists and is kept"):
        RecipeFile().write(path)
    assert path.read_text() == "mine"
    RecipeFile().write(path, overwrite=True)
    assert read_recipe(path) == RecipeFile()
