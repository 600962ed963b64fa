"""A headless browser looks at the pages: they draw, fit, need no network, and pass axe's accessibility
rules.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appo.config import load_recipe
from appo.reports import explain, figures
from appo.reports.compare import Comparison
from tests.reports.made_runs import FRAMES, TOKENS, make_group

SIZES = {"desktop": 1280, "phone": 375}


@pytest.fixture(scope="module")
def pages(compared: tuple[Comparison, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    recipe = load_recipe("demo")
    group = make_group(np.random.default_rng(4), "sample", algorithm="appo", seed=0, step=0)
    group["completions"][0] = "<b>not bold</b> & so on"
    html = explain.build_page(group, recipe, figures.Pictures(None, recipe), checkpoint="a/b/c", seed=0)
    path = tmp_path_factory.mktemp("explained") / "explain.html"
    path.write_text(html, encoding="utf-8")
    return {"compare": compared[0].html, "explain": path}


def opened(browser: Any, path: Path, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(path.as_uri())


@pytest.mark.slow
@pytest.mark.parametrize("page", ["compare", "explain"])
@pytest.mark.parametrize("size", SIZES)
def test_fits_and_passes_axe(browser: Any, pages: dict[str, Path], page: str, size: str) -> None:
    axe = pytest.importorskip("axe_playwright_python", reason="axe is not installed")
    rules = (resources.files(axe) / "axe.min.js").read_text(encoding="utf-8")
    opened(browser, pages[page], SIZES[size])
    assert browser.execute_script("return document.documentElement.scrollWidth") <= SIZES[size]
    browser.execute_script(rules)
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run(document, {runOnly: "
        "['wcag2a','wcag2aa','wcag21a','wcag21aa','best-practice']})"
        ".then(r => done(r.violations.map(v => v.id + ': ' + v.nodes.map(n => n.target + ' ' + "
        "n.failureSummary)"
        ".slice(0, 3).join(' | '))))"
    )
    assert found == []
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


@pytest.mark.slow
def test_every_figure_is_drawn(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["compare"], SIZES["desktop"])
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg[role=img]')].map(s => {const b = "
        "s.getBoundingClientRect();"
        "return [b.width, b.height, s.querySelector('title').textContent]})"
    )
    assert len(sizes) >= 9  # accuracy, four curves, phases, two maps, three side by side
    assert all(width > 200 and height > 80 for width, height, _ in sizes), sizes
    cells = browser.execute_script(
        "return document.querySelector('svg.heat').querySelectorAll('rect > title').length"
    )
    assert cells == FRAMES * len(TOKENS)
    shades = browser.execute_script(
        "return new Set([...document.querySelector('svg.heat').querySelectorAll('rect')].map(r => "
        "getComputedStyle(r).fill)).size"
    )
    assert shades > 10
    links = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].every(a => document.getElementById(a.hash.slice(1)))"
    )
    assert links


@pytest.mark.slow
def test_texts_of_completions_stay_texts(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["explain"], SIZES["desktop"])
    assert (
        browser.execute_script(
            "return [...document.querySelectorAll('b')].some(b => b.textContent == 'not bold')"
        )
        is False
    )
    weighted = browser.execute_script("return document.querySelectorAll('.tokens span[style]').length")
    assert weighted > 10


@pytest.mark.slow
def test_prints_on_a_few_pages_with_nothing_cut(browser: Any, pages: dict[str, Path]) -> None:
    import base64

    opened(browser, pages["compare"], SIZES["desktop"])
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF")
    assert 4 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") <= 14
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    # A printed A4 page of 96 dpi inside its margins is some 688 pixels wide
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 688, "height": 1000, "deviceScaleFactor": 1, "mobile": False},
    )
    over = browser.execute_script(
        "return [...document.querySelectorAll('table, svg')].filter(e => "
        "e.getBoundingClientRect().right > 690)"
        ".map(e => e.textContent.slice(0, 60))"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert over == []
