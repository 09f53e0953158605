"""Takes the documentation's pictures of pages and of the nine panels, in headless Chromium.

``python scripts/take_screenshots.py`` runs the commands that the pages show, on tiny-olmoe and the
demo articles, opens their output, and writes PNGs of few colours to docs/images. With ``--keep
FOLDER`` the runs stay in the folder, and later calls take pictures of these runs.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH = 1000  # CSS pixels
TEXT = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps. The river flows through the "
    "city and under three bridges, which were built in the 19th century."
)
SWEEP = "sweep --preset quick --baselines 2,3,4,8 --alphas 0.4,0.5,0.6"


def run(*arguments: str) -> None:
    """Run a command of the package."""
    print("lm-eval-bh", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "lm_eval_bh", *arguments], check=True)


def measure(folder: Path) -> None:
    """Write the pages and figures that are taken."""
    view = ["view", "--model", "tiny-olmoe", "--model-args", "policy=tiny-olmoe", "--text", TEXT]
    run(*view, "--output", str(folder / "view.html"))
    if not (folder / "runs" / "bh_routing_results.csv").exists():
        run(*SWEEP.split(), "--output-dir", str(folder / "runs"))
        run("aggregate", str(folder / "runs"))
    run("report", str(folder / "runs"))


def chromium(profile: Path) -> webdriver.Chrome:
    """Return a headless Chromium with a desktop's window."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    service = webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver")
    return webdriver.Chrome(options=options, service=service)


def take(browser: webdriver.Chrome, page: Path, height: int, do: str = "", at: str = "") -> bytes:
    """Return a PNG of a page, after a script has run and an element (CSS) was clicked."""
    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
    browser.get(page.resolve().as_uri())
    browser.execute_script(do)
    if at:
        found = browser.find_element(By.CSS_SELECTOR, at)
        ActionChains(browser).move_to_element(found).click().perform()
    return browser.get_screenshot_as_png()


def keep(png: bytes, name: str, width: int = WIDTH, colours: int = 128) -> None:
    """Write a PNG of few colours into docs/images."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if image.width > width:
        size = (width, round(image.height * width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = IMAGES / f"{name}.png"
    few = image.quantize(colours, dither=Image.Dither.NONE)
    few.save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Measure, open and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder of the runs, kept; default: none")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure(folder)
        panels = folder / "runs" / "visualizations" / "bh_comprehensive_comparison.png"
        keep(panels.read_bytes(), "nine_panels", 1500, 64)
        browser = chromium(Path(temporary) / "chromium")
        try:
            layer = (
                "const layer = document.querySelector('[name=layer]'); layer.selectedIndex = 1;"
                "layer.dispatchEvent(new Event('change', { bubbles: true }))"
            )
            token = "#panes .token:nth-of-type(10)"
            keep(take(browser, folder / "view.html", 1025, layer, token), "view")
            keep(take(browser, folder / "runs" / "bh_routing_report.html", 1200), "report")
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
