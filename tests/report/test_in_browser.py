"""The page of `dupr report` in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import Browser, chromium
from tests.support.command_line import dupr
from tests.support.images import noise_image
from tests.support.report_sources import make_results, write_labels, write_results, write_run

LONG = "a-long-name-without-any-break-that-no-column-of-a-telephone-can-hold-in-one-line"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything: runs, pictures, an evaluation, labels, long and hostile names."""
    root = tmp_path_factory.mktemp("report")
    image = root / "mine.png"
    noise_image(7, 60, 60).save(image)
    figures = {LONG: [30.0, 32.0], "<script>alert(1)</script>": [25.0, 26.0], "none": [20.0, 21.0]}
    sources = [
        tiny_run,
        write_run(root / LONG),
        write_results(root / "eval", make_results(figures, notes=[LONG])),
        write_labels(root / "labels"),
    ]
    # The second run has no checkpoint, so that only the first one has pictures.
    dupr("report", sources[0], "--image", image, "--out", root / "pictures.html")
    dupr("report", *sources, "--out", root / "page.html")
    return root / "page.html"


VIEWPORTS = [(width, dark) for width in (1280, 400) for dark in (False, True)]


@pytest.mark.parametrize("name", ["page.html", "pictures.html"])
@pytest.mark.parametrize(("width", "dark"), VIEWPORTS)
def test_the_page_fits_says_nothing_on_the_console_and_loads_nothing(
    browser: Browser, page: Path, name: str, width: int, dark: bool, tmp_path: Path
) -> None:
    file = page.with_name(name)
    browser.leave()
    browser.open(file, width, dark)
    assert browser.console() == []
    assert browser.requests() == [file.resolve().as_uri()]
    assert browser.run("return document.documentElement.scrollWidth") <= width
    wide = """
        const outside = [...document.querySelectorAll('body *')].filter(e =>
            e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg'));
        return outside.map(e => e.outerHTML.slice(0, 80));
    """
    assert browser.run(wide) == []
    shot = tmp_path / "shot.png"
    browser.screenshot(shot)
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("L"), float)
    # The paper: most of the page is as bright or as dark as readers prefer.
    assert (np.median(pixels) < 80) == dark


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_curves_stand_out_from_the_paper(browser: Browser, page: Path, dark: bool) -> None:
    """Contrast by WCAG 2: 4.5 for text, 3 for graphics."""
    browser.open(page, 1280, dark)
    contrast = """
        const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => {
            x /= 255; return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
        const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
            return (x + 0.05) / (y + 0.05); };
        const probe = document.body.appendChild(document.createElement('i'));
        const of = name => { probe.style.color = `var(${name})`;
            return getComputedStyle(probe).color; };
        const card = of('--card');
        const found = {};
        for (const name of ['--text', '--soft', '--good', '--open', '--bad', '--link',
                            '--c0', '--c1', '--c2', '--c3', '--c4', '--c5', '--c6'])
            found[name] = ratio(of(name), card);
        return found;
    """
    for name, found in browser.run(contrast).items():
        assert found >= (3 if name.startswith("--c") else 4.5), (name, found)
