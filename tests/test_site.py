"""The site of the documentation builds without a warning, and shows what was written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nmgraph
from nmgraph import errors

ROOT = Path(__file__).parent.parent
TEXT_OF_MARKDOWN = re.compile(
    r"^([-*] |\d+\. |\||```)|>>>|&gt;&gt;&gt;|\]\(|:(meth|class|func|mod|data):|──", re.MULTILINE
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Every page, as HTML by its path."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],  # --quiet would make --strict blind
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.html")}


def test_every_document_is_a_page(pages):
    documents = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert set(pages) == {"404.html", *(str(d.with_suffix(".html")).replace("README", "index") for d in documents)}


def test_a_page_fetches_nothing_from_the_network(pages):
    for name, page in pages.items():
        fetched = re.findall(r"<(?!a\b)[^>]*?\b(?:src|href|srcset)=[\"']?((?:https?:)?//[^\"'\s>]+)", page)
        assert not fetched, f"{name} fetches {fetched}"


def test_no_markdown_is_shown_as_text(pages):
    for name, page in pages.items():
        article = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", page.partition("<article")[2], flags=re.DOTALL)
        for paragraph in re.findall(r"<p>(.*?)</p>", article, re.DOTALL):
            assert not TEXT_OF_MARKDOWN.search(paragraph), f"{name} shows {paragraph[:200]}"


def test_the_reference_has_all_that_people_call_or_catch(pages):
    shown = {name for page in pages.values() for name in re.findall(r'id="(nmgraph\.[\w.]+)"', page)}
    offered = [getattr(nmgraph, name) for name in nmgraph.__all__ if name != "METHODS"]
    raised = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, nmgraph.NMGraphError)]
    assert {f"{o.__module__}.{o.__qualname__}" for o in [*offered, *raised, *nmgraph.METHODS.values()]} <= shown
