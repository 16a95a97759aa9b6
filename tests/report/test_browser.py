"""The page in a real browser: it works, it looks right at any width and in light and dark, and it is fast."""

import base64
import time

import pytest
from browser import look, opened
from reports import resnet50, trained, with_attention

import nmgraph


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    model, log = trained(folder)
    exported = nmgraph.export(model, folder / "export").directory
    return nmgraph.report(model, folder / "report.html", log=log, export=exported)


@pytest.fixture
def shown(browser, page):
    look(browser)
    browser.get(page.as_uri())
    return browser


def layers(driver):
    """Give the names of the rows that are shown, from top to bottom."""
    return driver.execute_script(
        "return Array.from(document.querySelectorAll('#layers tbody tr'))"
        ".filter(row => row.getBoundingClientRect().height).map(row => row.cells[0].textContent)"
    )


def head(driver, title):
    return driver.find_element("xpath", f"//table[@id='layers']//th[button[text()='{title}']]")


def test_page_loads_without_a_word_on_the_console_and_asks_for_nothing(shown):
    assert shown.get_log("browser") == []
    assert shown.execute_script("return performance.getEntriesByType('resource').map(r => r.name.slice(0, 5))") == []
    assert "every check of the export holds" in shown.find_element("class name", "verdict").text


def test_what_page_would_load_from_elsewhere_is_refused(shown):
    blocked = shown.execute_async_script(
        "const done = arguments[0]; document.addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));"
        "const image = new Image(); image.src = 'https://127.0.0.1/x.png'; document.body.append(image);"
    )
    assert blocked == "img-src"
    shown.get_log("browser")  # it says so there; the next test begins anew


def test_table_sorts_by_a_column_up_and_down(shown):
    assert layers(shown) == ["0", "2", "6"]
    weights = head(shown, "weights")
    weights.find_element("tag name", "button").click()
    assert (weights.get_attribute("aria-sort"), layers(shown)) == ("ascending", ["6", "0", "2"])
    weights.find_element("tag name", "button").click()
    assert (weights.get_attribute("aria-sort"), layers(shown)) == ("descending", ["2", "0", "6"])


def test_table_sorts_by_keyboard_and_one_column_says_so(shown):
    head(shown, "weights").find_element("tag name", "button").click()
    head(shown, "kept").find_element("tag name", "button").send_keys(" ")
    assert head(shown, "kept").get_attribute("aria-sort") == "ascending"
    assert head(shown, "weights").get_attribute("aria-sort") is None
    assert layers(shown) == ["2", "6", "0"]  # of equals, the model's order


def test_table_filters_by_words_in_any_column(shown):
    field = shown.find_element("id", "filter")
    field.send_keys("conv2d HOLDS")
    assert layers(shown) == ["2"]
    assert shown.find_element("id", "shown").text == "1 of 3 layers"


def test_pictures_decode_and_a_layer_is_chosen(shown):
    widths = shown.execute_script("return Array.from(document.images).map(image => image.naturalWidth)")
    assert len(widths) > 10
    assert min(widths) > 0
    assert [e.text for e in shown.find_elements("css selector", ".portrait > h3") if e.text] == ["2"]
    shown.find_element("link text", "6").click()
    assert [e.text for e in shown.find_elements("css selector", ".portrait > h3") if e.text] == ["6"]


def test_charts_have_ids_of_their_own(shown):
    ids = shown.execute_script("return Array.from(document.querySelectorAll('[id]')).map(e => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 380])
def test_nothing_sticks_out_and_everything_can_be_read(shown, width, scheme):
    look(shown, width=width, scheme=scheme)
    assert shown.execute_script("return document.scrollingElement.scrollWidth <= innerWidth")
    faint = shown.execute_script(CONTRAST)
    assert faint["seen"] > 100
    assert faint["below"] == []
    assert (faint["page"] < 0.1) == (scheme == "dark")


def test_table_of_a_dozen_layers_needs_no_scrolling_and_cards_fill_their_rows(browser, tmp_path):
    model, log = with_attention(tmp_path)
    look(browser)
    browser.get(nmgraph.report(model, tmp_path / "report.html", log=log).as_uri())
    assert "still keep more than 1 of 16" in browser.find_element("css selector", "#layers td.decision small").text
    assert browser.execute_script(
        "const s = document.querySelector('#layers').parentElement;"
        "return [s.scrollWidth - s.clientWidth, s.scrollHeight - s.clientHeight]"
    ) == [0, 0]
    tall = browser.execute_script(
        "return Array.from(document.querySelectorAll('#layers tbody tr')).map(r => r.getBoundingClientRect().height)"
    )
    assert max(tall) < 120
    for cards in (".tile", "#training .card"):
        rows = browser.execute_script(
            "const count = {}; for (const e of document.querySelectorAll(arguments[0])) "
            "{ const top = Math.round(e.getBoundingClientRect().top); count[top] = (count[top] || 0) + 1 }"
            "return Object.values(count)",
            cards,
        )
        assert max(rows) - min(rows) <= 1, (cards, rows)


def test_page_prints_in_dark_ink(shown):
    look(shown, scheme="dark")
    assert base64.b64decode(shown.print_page()).startswith(b"%PDF")
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    paper, ink = shown.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, getComputedStyle(document.querySelector('nav')).display]"
    )
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert (paper, ink) == ("rgb(255, 255, 255)", "none")


def test_report_of_resnet50_is_small_and_opens_fast(browser, tmp_path):
    model, log = resnet50(tmp_path)
    page = nmgraph.report(model, tmp_path / "report.html", log=log)
    assert page.stat().st_size < 5_000_000
    look(browser)
    taken = []
    for _ in range(3):  # of which the fastest counts: the machine does other things, too
        begun = time.monotonic()
        browser.get(page.as_uri())
        assert len(layers(browser)) == 54
        taken.append(time.monotonic() - begun)
    assert min(taken) < 2
    assert browser.get_log("browser") == []


# Luminance and contrast as WCAG 2 defines them; 4.5 is its AA for text.
CONTRAST = """
const channels = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const below = []; let seen = 0;
for (const element of document.body.querySelectorAll('*')) {
  const own = Array.from(element.childNodes).some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || !element.getClientRects().length || element.closest('script')) continue;
  const style = getComputedStyle(element);
  const text = channels(element.closest('svg') ? style.fill : style.color);
  const [high, low] = [light(text), light(behind(element))].sort((a, b) => b - a);
  seen += 1;
  if ((high + 0.05) / (low + 0.05) < 4.5) below.push([element.textContent.trim().slice(0, 40), text, behind(element)]);
}
return { below, seen, page: light(behind(document.body)) };
"""
