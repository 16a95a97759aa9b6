"""Take the picture of a report that the documentation shows: a wide window in light, top and masks; a narrow one in dark.

make demo && python tests/report/screenshot.py demo-output/report.html docs/images/report.png
"""

import argparse
import io
import tempfile
from pathlib import Path

from browser import look, opened
from PIL import Image

WIDE, NARROW, TOP, MASKS, GAP = 1400, 380, 950, 600, 24
HEIGHT = TOP + GAP + MASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    canvas = Image.new("RGB", (WIDE + GAP + NARROW, HEIGHT), "#9aa3ad")
    with tempfile.TemporaryDirectory() as profile, opened(profile) as driver:
        address = arguments.page.absolute().as_uri()
        driver.get(address)
        driver.execute_script("document.documentElement.style.scrollbarWidth = 'none'")
        look(driver, width=WIDE, height=TOP)
        paste(canvas, driver, (0, 0))
        look(driver, width=NARROW, height=HEIGHT, scheme="dark")
        paste(canvas, driver, (WIDE + GAP, 0))
        look(driver, width=WIDE, height=MASKS)
        driver.find_element("link text", "Masks").click()
        paste(canvas, driver, (0, TOP + GAP))
    canvas.quantize(96).save(arguments.picture, optimize=True)


def paste(canvas: Image.Image, driver, place: tuple[int, int]) -> None:
    canvas.paste(Image.open(io.BytesIO(driver.get_screenshot_as_png())), place)


if __name__ == "__main__":
    main()
