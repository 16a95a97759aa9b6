"""A real browser without a window: Debian's Chromium, driven by selenium."""

import os
import shutil
from contextlib import contextmanager

import pytest

SWITCHES = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def find(name):
    found = shutil.which(name)
    if found is None:
        message = f"{name} is not installed; `make browser` installs Debian's"
        # Where the gate runs, what is not looked at has failed.
        (pytest.fail if os.environ.get("NMGRAPH_BROWSER") == "required" else pytest.skip)(message)
    return found


@contextmanager
def opened(profile):
    """Give a browser with a profile of its own, which notes what pages say on the console."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = find("chromium")
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(find("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def look(driver, *, width=1400, height=900, scheme="light"):
    """Give the window a size in CSS pixels, and a colour scheme."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
