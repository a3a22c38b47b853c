"""The site in headless Chromium, opened from files: sorting, links, values under the pointer, keys, dark mode, a phone.

Skipped where there is no Chromium, unless BILINEAR_JAX_BROWSER is "required".
"""

import os
import shutil

import made
import pytest
from playwright.sync_api import sync_playwright

from bilinear_jax.pages import render
from bilinear_jax.pages.site import write_site

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--no-sandbox"]  # root has no sandbox

if CHROMIUM is None and os.environ.get("BILINEAR_JAX_BROWSER") != "required":
    pytest.skip("no chromium, chromium-browser or google-chrome on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "BILINEAR_JAX_BROWSER is required, and there is no Chromium: install Debian's chromium"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write_site(made.site(), tmp_path_factory.mktemp("pages") / "site").parent.as_uri()


@pytest.fixture
def open_page(browser, address):
    """Opens a page of the site. In the end nothing may have been complained of, or asked of a network."""
    contexts, complaints, requests = [], [], []

    def open_one(path, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{address}/{path}")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not complaints
    assert requests and all(url.startswith((f"{address}/", "data:")) for url in requests)


def hover(locator) -> None:
    """Put the pointer on an element that is on screen: a value vanishes with the next scrolling."""
    locator.scroll_into_view_if_needed()
    locator.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    locator.hover()


def shown(page) -> list[str]:
    return page.locator("table.index tbody tr:visible th").all_inner_texts()


def test_the_index_sorts(open_page):
    page = open_page("index.html")
    assert shown(page) == ["10", "11", "3"]  # the order asked for
    density = page.get_by_role("columnheader", name="Density")
    density.get_by_role("button").click()
    assert shown(page) == ["3", "10", "11"] and density.get_attribute("aria-sort") == "descending"
    density.get_by_role("button").press("Enter")
    assert shown(page) == ["11", "10", "3"] and density.get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="Feature", exact=True).click()
    assert shown(page) == ["3", "10", "11"] and density.get_attribute("aria-sort") is None
    page = open_page("index.html")  # 11, which has no R², is in the middle
    by_data = page.get_by_role("button", name="R² of pairs")
    for order in (["3", "10", "11"], ["10", "3", "11"]):  # what has no number comes last both ways
        by_data.click()
        assert shown(page) == order


def test_the_index_searches(open_page):
    page = open_page("index.html")
    page.keyboard.press("/")
    page.keyboard.type(" lily")  # a space as people type it
    assert shown(page) == ["3"] and page.locator("#found").inner_text() == "1 of 3"
    page.locator("#search").fill("none such")
    assert shown(page) == [] and page.locator("#none").is_visible()
    page.locator("#search").fill("1")
    assert shown(page) == ["10", "11"]
    page.keyboard.press("Enter")
    page.wait_for_url("**/output/10.html")
    page.keyboard.press("/")  # back to the search
    page.wait_for_url("**/index.html#search")
    assert page.locator("#search").evaluate("one => one === document.activeElement")


def test_a_pair_leads_to_its_input_feature_and_back(open_page):
    page = open_page("output/10.html")
    page.get_by_role("table", name="By weight").get_by_role("link", name="2", exact=True).first.click()
    page.wait_for_url("**/input/2.html")
    assert "Input feature 2" in page.locator("h1").inner_text()
    page.get_by_role("table", name="Output features whose pages name it").get_by_role("link", name="10").click()
    page.wait_for_url("**/output/10.html")


def test_the_contexts_of_a_pair_unfold(open_page):
    page = open_page("output/10.html")
    button = page.get_by_role("button", name="Contexts of 1 and 2").first
    detail = page.locator(f"#{button.get_attribute('aria-controls')}")
    assert not detail.is_visible() and button.get_attribute("aria-expanded") == "false"
    button.press("Enter")
    assert detail.is_visible() and button.get_attribute("aria-expanded") == "true"
    hover(detail.locator(".ctx b"))
    tip = page.locator("#tip").inner_text()
    assert "1: 4.00 · 2: 1.00" in tip and "“␣dog”" in tip and "position 39 of row 7" in tip


def test_values_show_under_the_pointer(open_page):
    page = open_page("output/10.html")
    tip, token = page.locator("#tip"), page.locator("ol.contexts .ctx").first.locator("*")
    hover(token.filter(has_text="é"))  # of two tokens: its position is that of the second
    assert tip.inner_text().split("\n") == ["“é” 3.00", "position 37 of row 7"]
    hover(token.filter(has_text="script"))  # no activation
    assert tip.inner_text().split("\n") == ["“<script>alert(1)</script>” 0", "position 30 of row 7"]
    hover(page.locator(".heat tbody tr").nth(1).locator("td").nth(2))
    assert tip.inner_text() == "1 \N{MULTIPLICATION SIGN} 2: 0.500"
    hover(page.locator(".histogram g").first)
    assert tip.inner_text() == "0 to 2.00: 3 tokens"
    page.locator("h1").hover()
    assert not tip.is_visible()


def test_values_show_at_the_focus_and_under_a_finger(open_page):
    page = open_page("output/10.html", has_touch=True)
    page.locator("ol.contexts .ctx").first.locator("span").nth(1).tap()
    assert page.locator("#tip").inner_text().startswith("“␣\"q'” 1.00")
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.locator("#theme").focus()
    page.keyboard.press("Tab")
    page.locator("ol.contexts .ctx").first.focus()
    assert page.locator("#tip").inner_text().startswith("“␣dog” 4.00")
    page.keyboard.press("ArrowLeft")  # within the context: no other page
    assert page.locator("#tip").inner_text().startswith("“␣&amp;” \N{MINUS SIGN}2.00")
    assert page.url.endswith("output/10.html")


def test_arrow_keys_move(open_page):
    page = open_page("output/10.html")
    for key, feature in (("ArrowRight", 11), ("ArrowRight", 3), ("ArrowLeft", 11)):
        page.keyboard.press(key)
        page.wait_for_url(f"**/output/{feature}.html")
    page = open_page("output/3.html")
    page.keyboard.press("ArrowRight")  # the last one
    page.keyboard.press("Control+ArrowLeft")  # the browser's own
    page.wait_for_timeout(100)
    assert page.url.endswith("output/3.html")


def test_dark_mode_follows_the_system_and_a_choice_is_remembered(open_page):
    def background(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = "rgb(255, 255, 255)", "rgb(24, 24, 24)"
    page = open_page("output/10.html", color_scheme="dark")
    shade = "getComputedStyle(document.querySelector('.p10')).backgroundColor"
    assert background(page) == dark and page.evaluate(shade) == "rgb(186, 84, 0)"
    button = page.get_by_role("button", name="Dark")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert background(page) == light and page.evaluate(shade) == "rgb(255, 140, 40)"
    page.get_by_role("link", name="Output features").click()
    page.wait_for_url("**/index.html")
    assert background(page) == light
    assert background(open_page("index.html", color_scheme="light")) == light


@pytest.mark.parametrize("path", ["index.html", "inputs.html", "output/10.html", "output/11.html", "input/2.html"])
def test_a_phone_need_not_scroll_sideways(open_page, path):
    page = open_page(path, viewport={"width": 400, "height": 800})
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    inner, outer = page.evaluate(wide)
    assert inner <= outer
    for button in page.locator("button.more").all()[:2]:
        button.click()
    inner, outer = page.evaluate(wide)
    assert inner <= outer


def test_a_notebook_shows_values_without_a_script(open_page, browser, tmp_path):
    file = tmp_path / "notebook.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><p>before</p>{render.notebook(made.site().outputs[0])}")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    page.locator(".ctx b").first.hover()
    assert page.locator(".ctx b").first.is_visible() and page.locator("h2").first.inner_text() == "Output feature 10"
    page.get_by_text("contexts", exact=True).first.click()
    assert page.get_by_text("underlined, where their product is largest").first.is_visible()
    context.close()
    open_page("index.html")
