"""The pictures of the documentation show what the code does today."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def pictures():
    return runpy.run_path(str(DOCS / "pictures.py"))


def test_pictures_are_what_their_script_draws(pictures):
    drawn = pictures["render"]()
    stale = [name for name, content in drawn.items() if (DOCS / "images" / name).read_bytes() != content]
    assert stale == [], "draw them anew: python docs/pictures.py"


def test_pictures_are_small(pictures):
    assert max(map(len, pictures["render"]().values())) < 60_000


def test_every_drawn_picture_is_shown_on_a_page(pictures):
    shown = (DOCS / "concepts.md").read_text()
    assert [name for name in pictures["render"]() if f"images/{name})" not in shown] == []
