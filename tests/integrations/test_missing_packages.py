"""A trainer's package that is not there is named, with the line that installs it."""

import importlib
import sys

import pytest

from nmgraph.errors import MissingPackageError


@pytest.mark.parametrize(
    ("name", "hidden", "expected"),
    [
        (
            "lightning",
            ["lightning.pytorch.callbacks", "pytorch_lightning.callbacks"],
            "nmgraph.integrations.lightning needs lightning: import of lightning.pytorch.callbacks halted; None in "
            "sys.modules. Install it: pip install lightning.",
        ),
        (
            "transformers",
            ["transformers"],
            "nmgraph.integrations.transformers needs transformers and accelerate: import of transformers halted; None in "
            "sys.modules. Install them: pip install transformers accelerate.",
        ),
    ],
)
def test_a_missing_trainer_is_named_with_how_to_install_it(name, hidden, expected, monkeypatch):
    for module in hidden:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"nmgraph.integrations.{name}", raising=False)
    with pytest.raises(MissingPackageError) as caught:
        importlib.import_module(f"nmgraph.integrations.{name}")
    assert str(caught.value) == expected
