"""Take the screenshots of ``docs/figures`` of a site of feature pages, in the system's Chromium:

bilinear-jax pages --model ts-nano --layer 2 --features top:200 --out site
python docs/screenshots.py site
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main(site: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("there is no chromium, chromium-browser or google-chrome: install one")
    figures = Path(__file__).parent / "figures"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        page.goto((site / "index.html").resolve().as_uri())
        page.screenshot(path=figures / "pages-index.png")
        page.locator("table.index tbody a").first.click()
        page.set_viewport_size({"width": 1280, "height": 1240})
        page.locator(".answers .ctx b").nth(3).hover()
        page.screenshot(path=figures / "pages-feature.png")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} SITE")
    main(Path(sys.argv[1]))
