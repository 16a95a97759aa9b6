"""The pictures of the documentation show what the code draws today."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def drawn():
    return runpy.run_path(str(DOCS / "pictures.py"))["render"]()


def test_pictures_are_what_their_script_draws(drawn):
    stale = [name for name, content in drawn.items() if (DOCS / "images" / name).read_bytes() != content]
    assert stale == [], "draw them anew: python docs/pictures.py"


def test_pictures_are_small_and_shown(drawn):
    page = (DOCS / "concepts.md").read_text()
    assert {
        name: len(content) < 60_000 and f"images/{name})" in page for name, content in drawn.items()
    } == dict.fromkeys(("blocks.svg", "backward.svg", "life.svg"), True)
