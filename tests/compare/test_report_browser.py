"""The report in a browser: it draws, sorts, fits and asks the network for nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.compare._fake import fake_results
from torchconv.compare.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra: test)")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not BROWSER or not DRIVER, reason="needs Chromium and chromedriver on the PATH")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(fake_results(), tmp_path_factory.mktemp("report") / "report.html")


def show(browser: Any, report: Path, width: int = 1280, theme: str = "light") -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(report.as_uri())


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390])
def test_fits_and_draws(browser: Any, report: Path, width: int, theme: str) -> None:
    show(browser, report, width, theme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    empty = browser.execute_script(
        "return [...document.querySelectorAll('svg.figure, .tiles img')]"
        ".filter(e => e.getBoundingClientRect().height < 10 || e.complete === false || e.naturalWidth === 0)"
        ".map(e => e.id || e.src)"
    )
    assert empty == []
    assert browser.execute_script("return document.querySelectorAll('svg.figure').length") >= 15
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 128")
    assert dark == (theme == "dark")


def test_labels_stay_inside_their_figures(browser: Any, report: Path) -> None:
    show(browser, report, 1280)
    outside = browser.execute_script(
        "return [...document.querySelectorAll('svg.figure text')].filter(t => {"
        "  const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();"
        "  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;"
        "}).map(t => t.closest('svg').id + ': ' + t.textContent)"
    )
    assert outside == []


def test_labels_of_points_do_not_touch(browser: Any, report: Path) -> None:
    show(browser, report, 1280)
    touching = browser.execute_script(
        "const found = [];"
        "for (const svg of document.querySelectorAll('svg.figure')) {"
        "  const texts = [...svg.querySelectorAll('.mark text')].map(t => [t.textContent, t.getBBox()]);"
        "  texts.forEach(([n, a], i) => texts.slice(0, i).forEach(([m, b]) => {"
        "    const w = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);"
        "    const h = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);"
        "    if (w > 0.5 && h > 2) found.push([svg.id, n, m]);"
        "  }));"
        "}"
        "return found;"
    )
    assert touching == []


def column(browser: Any, index: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#candidates > tbody')].map(b => b.rows[0].cells[arguments[0]].dataset.v)"
    )
    values: list[str] = browser.execute_script(script, index)
    return values


def test_sorting(browser: Any, report: Path) -> None:
    show(browser, report)
    heads = browser.find_elements("css selector", "#candidates > thead th")
    keys = [head.get_attribute("data-key") for head in heads]
    sorts = browser.find_elements("css selector", "#candidates .sort")
    assert heads[keys.index("accuracy")].get_attribute("aria-sort") == "descending"
    for key in ("macs", "latency", "accuracy", "difference"):
        index = keys.index(key)
        for _ in range(2):
            before = column(browser, index)
            sorts[index].click()
            order = heads[index].get_attribute("aria-sort")
            values = column(browser, index)
            known = [float(v) for v in values if v]
            assert known == sorted(known, reverse=order == "descending")
            assert values[len(known) :] == [""] * (len(values) - len(known))  # missing ones stay last
            assert sorted(values) == sorted(before)
            assert sum(head.get_attribute("aria-sort") is not None for head in heads) == 1
        assert values != before
    sorts[0].send_keys("\n")  # by keyboard
    assert column(browser, 0) == sorted(column(browser, 0))


def test_errors_unfold_under_their_row(browser: Any, report: Path) -> None:
    show(browser, report, 390)
    button = browser.find_element("css selector", ".open.trouble")
    more = browser.find_element("id", button.get_attribute("aria-controls"))
    assert not more.is_displayed()
    browser.execute_script("arguments[0].click()", button)
    assert button.get_attribute("aria-expanded") == "true"
    assert "OutOfMemoryError" in more.text
    browser.execute_script("document.querySelector('#candidates .sort').click()")
    above = browser.execute_script("return arguments[0].previousElementSibling.contains(arguments[1])", more, button)
    assert above
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_pointing_dims_the_others(browser: Any, report: Path) -> None:
    show(browser, report)
    count = (
        "document.querySelectorAll('tbody[data-c] button')[0].focus();"
        "return [...document.querySelectorAll('#pareto-params [data-c]')].map(g => g.classList.contains('dim'))"
    )
    dimmed = browser.execute_script(count)
    assert 0 < sum(dimmed) < len(dimmed)


def test_silent_and_offline(browser: Any, report: Path) -> None:
    browser.get_log("performance")
    browser.get_log("browser")
    show(browser, report)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert report.as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a title, a layer and a table as wide as they come, its alarm in the last section."""
    from matplotlib.figure import Figure

    from torchconv.analysis.inspection import Inspection
    from torchconv.analysis.inspection import write_report as write
    from torchconv.analysis.section import Picture, Section

    figure = Figure(figsize=(12, 3))
    figure.subplots().plot([0, 1])
    rows = [{"layer": "features.block." * 4 + str(i), **{f"column {c}": i / 7 for c in range(12)}} for i in range(9)]
    path = "torchconv:" + "a_very_long_name_" * 5
    wide = Section("wide", "Wide", path, "How to read it.", "good", {"layers": rows}, [Picture("p", figure, "r", "a")])
    found = Inspection(
        path, {"not counted": path}, [wide, Section("last", "Last", "Look here!", "", "bad")], {"x": path}
    )
    return write(found, tmp_path_factory.mktemp("inspection") / "page.html")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_inspection_fits_a_telephone(browser: Any, inspection: Path, theme: str) -> None:
    show(browser, inspection, 390, theme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    # A wide picture scrolls in its box instead of shrinking until nobody can read it.
    assert (
        browser.execute_script("return document.querySelector('img').parentElement.getBoundingClientRect().right")
        <= 390
    )
    inside = (
        "const box = document.querySelector('.scroll'); box.scrollLeft = 200; box.scrollTop = 60;"
        "const outer = box.getBoundingClientRect(), head = box.querySelector('th').getBoundingClientRect();"
        "const first = box.querySelector('td').getBoundingClientRect();"
        "return [box.scrollLeft, head.left - outer.left, first.left - outer.left, first.width / outer.width]"
    )
    scrolled, head, first, share = browser.execute_script(inside)
    assert scrolled == 200  # the table scrolls in its box, and the names of rows and columns stay
    assert (head, first) == (0, 0)
    assert share < 0.5
    verdicts = browser.find_elements("css selector", "ul.verdicts li")
    assert verdicts[0].text == "Look here!"
    colours = (
        "const style = name => getComputedStyle(document.querySelector(name));"
        "return [style('body').color, style('td').backgroundColor]"
    )
    text, ground = (int(c.split("(")[1].split(",")[0]) for c in browser.execute_script(colours))
    assert (text > 200 > 100 > ground) if theme == "dark" else (text < 50 < 200 < ground)
