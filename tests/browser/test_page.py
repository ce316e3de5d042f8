"""The HTML report in a real browser (Chromium, through playwright): what it loads, how it is reached, how it fits.

`QUANTDET_SCREENSHOTS=DIR` keeps the screenshots.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selftest.fakes.matrix import MATRIX, make_suite, setting

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCHEMES, WIDTHS = ("light", "dark"), (390, 1440)
# A message that would be markup, a title that is very long, a cell that is noisy and one that is another kernel.
MATRIX_HERE = (
    MATRIX.replace('title = "two formats, one hardware"', 'title = "<script>alert(1)</script> & <b>two</b> formats"')
    .replace('title = "GPTQ"', f'title = "{"long" * 60}"')
    + setting("ct", "flip_decode") + setting("int8", "wrong_kernel")
)  # fmt: skip

# Text whose contrast with what is behind it is below 4.5, as [text, ratio].
CONTRAST = """() => {
  const rgb = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, own = node.parentElement;
    if (!node.textContent.trim() || !own.checkVisibility() || own.closest('title, desc, .hidden, style')) continue;
    let behind = own, back = [0, 0, 0, 0];
    while (behind && back.length === 4 && back[3] === 0) {
      back = rgb(getComputedStyle(behind).backgroundColor);
      behind = behind.parentElement;
    }
    const style = getComputedStyle(own);
    const [a, b] = [light(rgb(own.closest('svg') ? style.fill : style.color)), light(back)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push([node.textContent.trim().slice(0, 40), ratio]);
  }
  return found;
}"""
# What is wider than the window and not inside something that scrolls.
WIDE = """() => [...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
  && !e.closest('.scroll, .picture, .skip, .hidden')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 120))"""

# Names of rows that lie on what stands beside them.
OUTSIDE = """() => [...document.querySelectorAll('tbody th')].filter(e => e.checkVisibility()).filter(e => {
  const inside = document.createRange();
  inside.selectNodeContents(e);
  return inside.getBoundingClientRect().right > e.getBoundingClientRect().right;
}).map(e => e.textContent)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; the tests are skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright), have none")
    known = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        if known is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(f"needs a browser ({', '.join(BROWSERS)}, or playwright install chromium), have none")
        started = playwright.chromium.launch(executable_path=known, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the fake engine: unexpected verdicts, noise, controls, skips."""
    folder = tmp_path_factory.mktemp("run")
    make_suite(folder, MATRIX_HERE)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "QUANTDET_", "CI"))}
    command = [sys.executable, "-m", "pytest", "-q", "--report=r", "--junitxml=r/report.xml", "-k", "cpu-here"]
    run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    return folder / "r" / "report.html"


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """Opens the page at a width and in a scheme; afterwards nothing may have been loaded or complained about."""
    noise: list[str] = []

    def open_(width: int, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        page.on("console", lambda message: noise.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: noise.append(f"error: {error}"))
        page.on("dialog", lambda dialog: noise.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: noise.append(f"request: {request.url}") if request.url != report.as_uri() else None)
        page.goto(report.as_uri())
        return page

    yield open_
    assert noise == []


def test_first_screen(opened: Any) -> None:
    """Title, what was run, figures, controls; then what was not expected, with the command that reruns it."""
    page = opened(1440)

    assert page.inner_text("h1") == "Determinism of quantized inference"
    assert "fake's machine" in page.inner_text(".facts")
    assert "BIT_EXACT count" in page.inner_text("header")
    cases, causes = re.findall(r"\d+", page.inner_text("#unexpected + p"))
    assert (page.locator(".alarm li").count(), page.inner_text(".tiles .bad b")) == (int(causes), cases)
    first = page.locator(".alarm li").first
    assert first.bounding_box()["y"] < 900
    assert "pytest " in first.locator("pre code").inner_text()
    assert page.locator("#matrix").bounding_box()["y"] > page.locator(".alarm li").last.bounding_box()["y"]
    assert page.locator("script, b b, [onerror]").count() == 0
    assert "<script>alert(1)</script>" in page.inner_text("main")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(opened: Any, width: int) -> None:
    """Closed and with everything opened: wide tables scroll in regions of their own."""
    page = opened(width)

    for _ in range(2):
        assert page.evaluate(WIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")


@pytest.mark.parametrize("width", (320, 390))
def test_names_stay_in_their_column(opened: Any, width: int) -> None:
    """On a phone, a long name beside a value is broken: after an underscore, or anywhere where it has none."""
    page = opened(width)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")

    assert page.locator("[aria-labelledby=environment] tbody th wbr").count() > 0
    page.evaluate("document.querySelectorAll('tbody th').forEach(one => one.append(' ' + 'variable'.repeat(4)))")
    assert page.evaluate(OUTSIDE) == []


def test_the_keyboard_reaches_everything(opened: Any) -> None:
    """Skip link first; figures of a cell open with Enter; what scrolls takes the focus; a grey cell says need and have."""
    page = opened(390)

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")
    summary = page.locator("td summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert "tokens per second" in page.locator("td details[open] dl").first.inner_text()
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    inert = "e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0"
    assert page.evaluate(f"[...document.querySelectorAll('.scroll, .picture')].filter({inert}).length") == 0
    page.locator(".gap a").first.focus()
    why = page.locator(".gap a:focus + .why")
    assert why.is_visible() and why.bounding_box()["width"] == 390
    assert page.evaluate("getComputedStyle(document.querySelector('.gap a:focus')).outlineStyle") != "none"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_can_be_read(opened: Any, scheme: str) -> None:
    """A contrast of at least 4.5 everywhere, in both schemes."""
    page = opened(1440, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")

    assert page.evaluate(CONTRAST) == []


def test_screenshots(opened: Any, tmp_path: Path) -> None:
    """Light and dark, a phone and a desk: the schemes differ, and the pictures are there to be looked at."""
    folder = Path(os.environ.get("QUANTDET_SCREENSHOTS") or tmp_path)
    for scheme in SCHEMES:
        for width in WIDTHS:
            opened(width, scheme).screenshot(path=folder / f"report-{scheme}-{width}.png", full_page=True)

    pictures = {(folder / f"report-{scheme}-{width}.png").read_bytes() for scheme in SCHEMES for width in WIDTHS}
    assert len(pictures) == len(SCHEMES) * len(WIDTHS)


def test_paper(opened: Any, tmp_path: Path) -> None:
    """Printed, closed parts are open and nothing hides behind a scroll bar; n and bound need no opening."""
    page = opened(1440)
    assert "Open a kernel" in page.inner_text("#matrix ~ p") and "n 3" not in page.inner_text("main table >> nth=0")
    page.emulate_media(media="print")

    assert "Open a kernel" not in page.inner_text("main")
    assert "n 3, flips < 0.632" in page.inner_text("main table >> nth=0")

    assert page.locator("#why-1").is_visible()
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    # A map with its caption, and both with the heading above them, on one page.
    breaks = """name => [...document.querySelectorAll(name)].map(e => getComputedStyle(e))
      .map(s => [s.breakInside, s.breakAfter])"""
    assert {tuple(one) for one in page.evaluate(breaks, "figure")} == {("avoid", "auto")}
    assert {after for _, after in page.evaluate(breaks, "h2, h3, h4, h2 + p, h3 + p, figcaption")} == {"avoid"}
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
