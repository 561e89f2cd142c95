"""The pipeline's report in a real browser: what a phone, a desk and paper show of it."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from headless import Browser, find_browser
from pipeline_folder import write_pipeline

from grpo_engine.report.pipeline import write_pipeline_report

BROWSER = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None,
        reason="needs Chromium or Chrome on PATH, or its path in the environment's CHROMIUM",
    ),
]
WIDTHS = (360, 768, 1200)

# Elements that stick out of the window to the right, those inside a box that scrolls apart.
STICKING_OUT = """[...document.querySelectorAll("body *")].filter((e) => {
  if (e.closest(".scroll") || e.closest("pre") || e.closest("svg.narrow, svg.wide")) return false;
  const box = e.getBoundingClientRect();
  return box.width > 0 && box.right > WIDTH + 0.5;
}).map((e) => e.tagName + "." + e.className)"""

# Height in pixels of the smallest text of each drawing that is shown.
SMALLEST_TEXT = """[...document.querySelectorAll("svg")].filter((s) => s.clientWidth).map((s) =>
  Math.min(...[...s.querySelectorAll("text")].map((t) => t.getBoundingClientRect().height)))"""

# Texts of a drawing that lie over another text of it.
COVERED = """[...document.querySelectorAll(".flow svg")].flatMap((s) => {
  if (!s.clientWidth) return [];
  const texts = [...s.querySelectorAll("text")].filter((t) => t.textContent);
  const boxes = texts.map((t) => t.getBoundingClientRect());
  return texts.filter((t, i) => boxes.some((b, j) => j < i && b.left < boxes[i].right &&
    boxes[i].left < b.right && b.top < boxes[i].bottom - 2 && boxes[i].top < b.bottom - 2));
}).map((t) => t.textContent)"""

# Texts of the diagram that leave their drawing, or its box if they are in one.
CUT_OFF = """[...document.querySelectorAll(".flow svg")].flatMap((s) => {
  if (!s.clientWidth) return [];
  const edge = s.getBoundingClientRect().right;
  const box = s.querySelector("rect.box").getBoundingClientRect().right;
  return [...s.querySelectorAll("text")].filter((t) =>
    t.getBoundingClientRect().right > (t.matches(".side") ? edge : box));
}).map((t) => t.textContent)"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_pipeline_report(write_pipeline(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def browser():
    with Browser(BROWSER) as one:
        yield one


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_window_and_asks_for_nothing(browser, path, width):
    browser.open(path, width)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(STICKING_OUT.replace("WIDTH", str(width))) == []
    assert browser.requests() == [path.resolve().as_uri()]
    assert browser.complaints() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_its_drawings_can_be_read(browser, path, width):
    browser.open(path, width)
    sizes = browser.evaluate(SMALLEST_TEXT)
    assert len(sizes) > 15 and min(sizes) > 10
    assert browser.evaluate(COVERED) == []
    assert browser.evaluate(CUT_OFF) == []
    shown = "[...document.querySelectorAll('.flow svg')].map((s) => s.clientWidth > 0)"
    assert browser.evaluate(shown) == ([True, False] if width <= 640 else [False, True])


def test_a_table_that_is_too_wide_scrolls_by_itself(browser, path):
    browser.open(path, 360)
    wide = "document.querySelector('.models .scroll')"
    assert browser.evaluate(f"{wide}.scrollWidth > {wide}.clientWidth")
    browser.evaluate(f"{wide}.scrollLeft = 200")
    label = f"{wide}.querySelector('td').getBoundingClientRect().left"
    assert browser.evaluate(f"{label} - {wide}.getBoundingClientRect().left") == 0  # stays in view


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_screenshots_are_not_blank(browser, path, tmp_path, width, scheme):
    browser.open(path, width, scheme=scheme)
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 150_000
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(251, 250, 246)", "dark": "rgb(20, 22, 26)"}[scheme]


def test_a_chart_says_its_values_under_the_pointer(browser, path):
    browser.open(path, 1200)
    browser.evaluate("document.querySelector('svg[data-chart]').scrollIntoView()")
    box = browser.evaluate(
        "(({right, top, height}) => [right, top + height / 2])"
        "(document.querySelector('svg[data-chart]').getBoundingClientRect())"
    )
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] - 12, y=box[1])
    lines = browser.evaluate("document.querySelector('.tip').innerText").splitlines()
    assert lines[0] == "step 4" and len(lines) == 6
    assert lines[2].split() == ["Dev2", "75.0", "%"]


def test_what_models_say_does_not_run(browser, tmp_path):
    answer = "<script>document.title = 'taken'</script></style></pre><b onclick=x>" + "long" * 500
    folder = write_pipeline(tmp_path / "run", answer=answer)
    path = write_pipeline_report(folder)
    browser.open(path, 360)
    assert browser.evaluate("document.title").startswith("miniature")
    assert browser.evaluate("document.querySelectorAll('b[onclick]').length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert browser.evaluate(STICKING_OUT.replace("WIDTH", "360")) == []
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.complaints() == []


def test_it_reads_without_its_script(browser, path):
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(path, 1200)
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert "What cold start changes" in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.querySelectorAll('svg[data-chart] path.line').length") > 10


def test_print_cuts_nothing_off(browser, path, tmp_path):
    browser.open(path, 794)  # A4 at 96 dots an inch
    browser.ask("Emulation.setEmulatedMedia", media="print")
    too_wide = """[...document.querySelectorAll(".scroll, figure, svg")].filter((e) =>
      e.clientWidth && e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent.slice(0, 60))"""
    assert browser.evaluate(too_wide) == []
    browser.ask("Emulation.setEmulatedMedia", media="")
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    if shutil.which("pdftotext"):
        command = ["pdftotext", "-layout", str(tmp_path / "page.pdf"), "-"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "Machine and versions" in text and "Student, RL alone" in text
