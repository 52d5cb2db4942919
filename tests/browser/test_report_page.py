"""The pages of records/report.py in headless Chromium, narrow and wide, light and dark. `make test-browser` installs what it needs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import leaderboard
import pytest
import report
import test_leaderboard as folders
import test_report as runs

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; run: make test-browser")
pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (400, 1280)
PAGES = ("one run", "several runs", "damaged run", "public records")
# Shown by the browser as text, or the page is broken into.
EVIL = "<img src=x onerror=\"document.title='taken over'\"><script>document.title='taken over'</script>"
LEAST_CONTRAST = 4.5  # WCAG 2.2, success criterion 1.4.3, for text of ordinary size

# Contrast by WCAG 2.2 of every element that holds text itself, against the nearest background that is not transparent.
CONTRASTS = """() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const background = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const texts = [...document.body.querySelectorAll('*')].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  return texts.map(e => {
    const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(background(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${e.tagName} ${e.className}: ${e.textContent.trim().slice(0, 40)}`];
  });
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The path of each of PAGES."""
    place = tmp_path_factory.mktemp("pages")
    first = runs.write(place / "first", runs.whole_run("first"))
    long_name = "a-long-name-without-any-place-to-break-it-" * 3
    second = runs.write(place / "second", runs.whole_run(long_name, settings={"MATRIX_LR": 0.03, "NOTE": EVIL}, val_bpb=1.2, bytes_total=16_100_000))
    damaged = runs.write(place / "damaged", [*runs.header(EVIL), *runs.training(4, 100)], tail='{"torn')
    assert report.main([str(first)]) == 0
    assert report.main([str(first), str(second), "--output", str(place / "several")]) == 0
    assert report.main([str(damaged), str(place / "missing"), "--output", str(place / "damaged_report")]) == 1
    own = place / "own"
    folders.put(own, "2026-04-03_Demo", {**folders.FULL, "name": "Demo of ours"})
    (own / "records" / "README.md").write_text("", encoding="utf-8")
    checkout = place / "checkout"
    for index in range(6):
        content = {**folders.FULL, "name": f"Record {index} with SwiGLU", "date": f"2026-04-{1 + 5 * index:02d}", "val_bpb": 1.2 - 0.01 * index}
        folders.put(checkout, f"2026-04-0{index}_Name", {**content, "bytes_total": 15_900_000 + 7_000 * index}, train__log=folders.LOG)
    folders.put(checkout, "2026-04-09_Evil", {**folders.FULL, "name": EVIL, "author": long_name, "val_bpb": 1.19})
    folders.put(checkout, "2026-04-09_Broken", "{")
    with mock.patch.object(leaderboard, "README", own / "records" / "README.md"):
        assert report.main(["--import", str(checkout), "--output", str(place / "public")]) == 1
    places = first / "report", place / "several", place / "damaged_report", place / "public"
    return {name: next(folder.glob("*.html")) for name, folder in zip(PAGES, places, strict=True)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium: the one that playwright installed, or else one in PATH."""
    with sync_api.sync_playwright() as playwright:
        installed = Path(playwright.chromium.executable_path).exists()
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        if not installed and not found:
            pytest.skip(f"no browser: neither playwright's Chromium nor one of {', '.join(BROWSERS)} in PATH; run: make test-browser")
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        chromium = playwright.chromium.launch(executable_path=None if installed else found, args=arguments)
        yield chromium
        chromium.close()


class Opened:
    """A page in the browser, and everything that it asked for or complained about."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")


@pytest.fixture(params=PAGES)
def path(request: pytest.FixtureRequest, pages: dict[str, Path]) -> Path:
    return pages[request.param]


@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_and_is_silent_and_asks_for_nothing(browser: Any, path: Path, width: int) -> None:
    opened = Opened(browser, path, width)
    assert opened.complaints == []
    assert opened.requests == [path.as_uri()]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = opened.page.evaluate("[...document.querySelectorAll('h1, h2, p, figure, img, .scroll, .card')].map(e => e.getBoundingClientRect().right)")
    assert max(boxes) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_every_plot_is_an_image_with_a_description(browser: Any, path: Path, width: int) -> None:
    opened = Opened(browser, path, width)
    images = opened.page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.width, i.alt.trim()])")
    assert len(images) == path.read_text(encoding="utf-8").count("<figure>") > 0
    for complete, natural_width, natural_height, shown_width, words in images:
        assert complete and natural_width > 1000 and natural_height > 200 and shown_width > 0.8 * min(width, 900) and words, words


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(browser: Any, path: Path, scheme: str) -> None:
    opened = Opened(browser, path, 1280, scheme)
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
    contrasts = opened.page.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert [where for contrast, where in contrasts if contrast < LEAST_CONTRAST] == []


def test_names_from_files_are_text(browser: Any, pages: dict[str, Path]) -> None:
    for name in ("several runs", "damaged run", "public records"):
        opened = Opened(browser, pages[name], 1280)
        assert EVIL in opened.page.inner_text("body") and "taken over" not in opened.page.title().replace(EVIL, ""), name
        assert opened.page.evaluate("document.querySelectorAll('script, img[onerror]').length") == 0


def test_exact_numbers_open_without_a_script(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(pages["several runs"].as_uri())
    summary = page.get_by_text("Exact differences to MATRIX_LR=not recorded")
    cell = page.get_by_text("-0.024400", exact=True)
    assert not cell.is_visible()
    summary.click()
    assert cell.is_visible()


def test_links_lead_to_the_public_folders_only(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["public records"], 1280)
    links = opened.page.evaluate("[...document.links].map(link => link.href)")
    rows = json.loads((pages["public records"].parent / "records.json").read_text(encoding="utf-8"))["records"]
    assert sorted(links) == sorted(leaderboard.PUBLIC_ADDRESS + row["folder"] for row in rows if not row["ours"])
