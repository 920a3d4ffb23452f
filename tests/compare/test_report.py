"""The report of a comparison: complete, escaped, honest about what is missing."""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import math
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.compare._fake import fake_results
from torchconv.compare import _format as fmt
from torchconv.compare._page import badge, page
from torchconv.compare._pictures import diverging, gallery, heat, receptive_field
from torchconv.compare._svg import Scale, _overlap, place_labels, png, spread
from torchconv.compare.plots import Series
from torchconv.compare.report import front_of, write_csv, write_report

VOID = {"meta", "img", "br", "input", "link", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, references, scripts, event handlers and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.refs: list[str] = []
        self.handlers: list[str] = []
        self.addresses: list[str] = []
        self.count: dict[str, int] = {}
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            elif key in ("aria-labelledby", "aria-controls"):
                self.refs += (value or "").split()
            elif key in ("src", "href", "xlink:href"):
                self.addresses.append(value or "")
            elif key.startswith("on"):
                self.handlers.append(key)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def words(self) -> str:
        return "".join(self.text).replace("\u202f", " ")


def parsed(results: dict[str, Any], folder: Path) -> Page:
    page = Page(write_report(results, folder / "report.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert set(page.refs) <= set(page.ids)
    assert not page.handlers
    assert page.count["script"] == 1
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    return page


def test_whole_report(tmp_path: Path) -> None:
    results = fake_results()
    assert len(results["candidates"]) == 8
    path = write_report(results, tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    assert path.stat().st_size < 1_500_000
    assert "Content-Security-Policy" in path.read_text(encoding="utf-8")
    page = parsed(results, tmp_path)
    for section in (
        "verdict",
        "table",
        "tradeoffs",
        "learning",
        "kernels",
        "fields",
        "robustness",
        "method",
        "environment",
    ):
        assert section in page.ids
    for figure in (
        "forest",
        "pareto-params",
        "pareto-macs",
        "pareto-latency",
        "curve-val_accuracy",
        "curve-train_loss",
    ):
        assert figure in page.ids
    assert {"robust-noise", "robust-blur", "erf-0"} <= set(page.ids)
    words = page.words()
    assert "torch.OutOfMemoryError: tried to allocate 1.21 GiB" in words
    assert "no width has 49000 parameters within 2 %" in words
    assert results["command"] in words
    assert "images were enlarged" in words
    assert "aten.sort" in words
    assert "Difference larger than the noise" in words


HOSTILE = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>{{ 7*7 }}&amp;"


def test_everything_from_the_results_is_escaped(tmp_path: Path) -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k == "status" else poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return HOSTILE + value if isinstance(value, str) else value

    results = poison(fake_results())
    results["candidates"][0]["options"] = {HOSTILE: HOSTILE}
    results["environment"][HOSTILE] = {HOSTILE: [HOSTILE]}
    page = parsed(results, tmp_path)
    assert HOSTILE in page.words()
    assert "49&amp;" not in page.words()


def test_status_is_escaped_too(tmp_path: Path) -> None:
    results = fake_results()
    results["candidates"][0]["status"] = HOSTILE
    results["candidates"][2]["error"] = "a file name that is no text: \udcff"
    results["candidates"][1]["trials"][0]["status"] = HOSTILE
    assert HOSTILE in parsed(results, tmp_path).words()


@pytest.mark.parametrize(
    ("key", "section"),
    [("erf", "fields"), ("kernels", "kernels"), ("curves", "learning"), ("robustness", "robustness")],
)
def test_a_missing_part_leaves_its_section_out(tmp_path: Path, key: str, section: str) -> None:
    results = fake_results()
    for value in (None, "absent"):
        for candidate in results["candidates"]:
            candidate.pop(key, None) if value else candidate.__setitem__(key, None)
        assert section not in parsed(results, tmp_path).ids


def test_one_candidate_without_a_part_keeps_the_others(tmp_path: Path) -> None:
    results = fake_results()
    del results["candidates"][1]["erf"], results["candidates"][1]["latency"]
    ids = parsed(results, tmp_path).ids
    assert "erf-0" in ids
    assert "erf-1" not in ids
    assert "pareto-latency" in ids


def test_single_seed(tmp_path: Path) -> None:
    results = fake_results(seeds=1)
    for candidate in results["candidates"]:
        if "accuracy" in candidate:
            candidate["accuracy"].update(low=None, high=None)
        candidate["difference"] = None
    page = parsed(results, tmp_path)
    assert "forest" not in page.ids
    assert "Noise not measured" in page.words()
    assert "its band reaches" not in page.words()


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"schema": 1, "candidates": []},
        {"schema": 1, "candidates": [{}]},
        {"schema": 1, "candidates": None, "verdict": None, "dataset": None, "config": None, "environment": None},
        {"candidates": [{"op": "conv", "status": "failed", "error": "boom", "accuracy": None, "trials": None}]},
        {"candidates": [{"op": "conv", "accuracy": {"mean": 0.5}, "curves": [{"seed": 0}], "counts": {"matmul": 0}}]},
        {"candidates": [{"op": "conv", "accuracy": {"mean": float("nan")}, "latency": {}, "erf": {"map": [[]]}}]},
    ],
)
def test_almost_empty_results(tmp_path: Path, results: dict[str, Any]) -> None:
    parsed(results, tmp_path)
    write_csv(results, tmp_path / "results.csv")


def test_all_failed(tmp_path: Path) -> None:
    results = fake_results()
    for candidate in results["candidates"]:
        for key in set(candidate) - {"op", "label", "trials"}:
            candidate[key] = None
        candidate.update(status="failed", error="no memory")
    words = parsed(results, tmp_path).words()
    assert "Nothing could be measured" in words
    assert words.count("no memory") == 8


def test_nothing_is_lost_when_any_value_is_null(tmp_path: Path) -> None:
    """Every leaf and branch of a candidate set to null in turn: the page is still written."""
    whole = fake_results(incomplete=False)
    whole["candidates"] = whole["candidates"][:2]
    for candidate in whole["candidates"]:
        candidate["kernels"] = [{"name": "mixer", "data": [[[1.0]]]}]
        candidate["erf"]["map"] = [[0.0, 1.0]]
    paths: list[tuple[str, ...]] = []

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        for key, value in tree.items() if isinstance(tree, dict) else ():
            paths.append((*path, key))
            walk(value, (*path, key))

    walk(whole["candidates"][1], ())
    for path in paths:
        results = copy.deepcopy(whole)
        node = results["candidates"][1]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = None
        page(results)
    assert len(paths) > 60


def test_series_and_volumes(tmp_path: Path) -> None:
    results = fake_results()
    one, two, three = results["candidates"][:3]
    one["erf"].update(size=[128], map=np.linspace(0, 1, 64).reshape(1, 64).tolist())
    one["kernels"] = [{"name": "mixer", "data": np.ones((8, 9)).tolist()}]
    two["kernels"] = [{"name": f"mixer[{i}]", "data": np.eye(5).tolist()} for i in range(16)]
    three["kernels"] = [{"name": "mixer", "data": np.ones((4, 3, 5, 5)).tolist()}]
    page = parsed(results, tmp_path)
    assert "erf-0" in page.ids
    found = gallery(Series(1, "two", two))
    assert found is not None
    assert [(layer.name, len(layer.images), layer.shape) for layer in found.layers] == [("mixer", 16, "5 × 5")]
    field = receptive_field(Series(4, "even", {"erf": {"size": [8, 8], "map": [[0.0] * 8] * 8, "sides": {"0.5": 3}}}))
    assert field is not None
    assert 'x="75" y="75" width="75" height="75"' in field  # pixels 3 to 5 of 0 to 7, 25 units each
    found = gallery(Series(2, "three", three))
    assert found is not None
    assert found.slices
    assert found.layers[0].shape == "5 × 5"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results='list'"):
        write_report([], tmp_path / "r.html")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\['schema'\]=2"):
        write_report({"schema": 2}, tmp_path / "r.html")
    with pytest.raises(ValueError, match=r"\['candidates'\]"):
        write_csv({"candidates": ["conv"]}, tmp_path / "r.csv")
    assert not list(tmp_path.iterdir())


def test_csv(tmp_path: Path) -> None:
    results = fake_results()
    path = write_csv(results, tmp_path / "results.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    assert [row["label"] for row in rows] == [c["label"] for c in results["candidates"]]
    row, candidate = rows[3], results["candidates"][3]
    assert float(row["accuracy_mean"]) == candidate["accuracy"]["mean"]
    assert float(row["latency_b1_p95_ms"]) == candidate["latency"]["batch1"]["p95_ms"]
    assert json.loads(row["options"]) == candidate["options"]
    assert row["pareto_params"] == "True"
    assert [r["baseline"] for r in rows].count("True") == 1
    assert rows[6]["error"] == candidate["error"] or "OutOfMemoryError" in rows[6]["error"]
    assert rows[6]["accuracy_mean"] == ""


def test_front_is_worked_out_where_the_run_has_none() -> None:
    results = fake_results()
    recorded = front_of(results, "macs")
    del results["pareto"]
    assert front_of(results, "macs") == recorded


@pytest.mark.parametrize(
    ("pick", "text", "headline"),
    [
        ("dcls", "It wins. By far.", ("Use dcls", "It wins. By far.")),
        ("conv", "None is better.", ("Stay with conv", "None is better.")),
        (None, "No verdict: 0.5 failed. Try again.", ("No verdict: 0.5 failed.", "Try again.")),
        (None, None, ("This run ended without a verdict.", "")),
    ],
)
def test_headline(pick: str | None, text: str | None, headline: tuple[str, str]) -> None:
    results = fake_results()
    results["verdict"] = {"pick": pick, "text": text}
    context = page(results)
    assert (context["headline"], context["lead"]) == headline


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "yes"),
        ({"significant": False}, "no"),
        ({"significant": None}, "unknown"),
        ({"mean": -0.02}, "no"),
    ],
)
def test_badge(change: dict[str, Any], kind: str) -> None:
    results = fake_results()
    results["candidates"][3]["difference"].update(change)
    series = [Series(i, c["label"], c, i == 0) for i, c in enumerate(results["candidates"])]
    assert badge(results, series)["kind"] == kind


def test_badge_when_the_baseline_wins() -> None:
    results = fake_results(incomplete=False)
    series = [Series(i, c["label"], c, i == 0) for i, c in enumerate(results["candidates"])]
    results["verdict"]["pick"] = "conv"
    assert badge(results, series)["text"] == "Some gains are larger than the noise"
    for candidate in results["candidates"][1:]:
        candidate["difference"]["significant"] = False
    assert badge(results, series)["kind"] == "no"
    for candidate in results["candidates"][1:]:
        candidate["difference"].update(mean=-0.05, significant=True)
    assert badge(results, series)["kind"] == "yes"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(60, 340), st.floats(30, 230)), min_size=1, max_size=9), st.integers(3, 14))
def test_labels_do_not_collide(points: list[tuple[float, float]], letters: int) -> None:
    frame = (44.0, 8.0, 360.0, 250.0)
    boxes = place_labels(points, [(letters * 6.0, 12.0)] * len(points), frame, [])
    for i, a in enumerate(boxes):
        assert _overlap(a, frame) == pytest.approx(letters * 72.0)
        for b in boxes[:i]:
            assert _overlap(a, b) == 0


@given(st.lists(st.floats(-50, 350), min_size=1, max_size=18))
def test_spread(wanted: list[float]) -> None:
    places = spread(wanted, 12, 10, 226)
    assert all(10 - 1e-6 <= p <= 226 + 1e-6 for p in places)
    ordered = sorted(places)
    assert all(b - a >= 12 - 1e-6 for a, b in pairwise(ordered))
    ranked = [places[i] for i in sorted(range(len(wanted)), key=lambda i: wanted[i])]
    assert ranked == sorted(ranked)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.booleans())
def test_ticks_are_few_and_inside(low: float, width: float, log: bool) -> None:
    low = abs(low) + 1e-3 if log else low
    high = low * (1 + width) if log else low + width
    ticks = Scale(low, high, 0, 100, log).ticks()
    slack = 1e-8 * (high - low)
    assert len(ticks) <= 8
    assert all(low - slack <= t <= high + slack for t in ticks)
    assert ticks == sorted(ticks)


def test_pictures() -> None:
    values = np.array([[-1.0, 0.0, 0.5]])
    uri = png(diverging(values, 1.0))
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        pixels = np.asarray(image)
    assert np.array_equal(pixels, diverging(values, 1.0))
    blue, nothing, orange = pixels[0].astype(int)
    assert blue[2] > blue[0]
    assert nothing[3] == 0
    assert orange[0] > orange[2]
    assert 0 < orange[3] < blue[3] == 255
    brightness = heat(np.linspace(0, 1, 50)[None])[0, :, :3].astype(float) @ [0.2, 0.7, 0.1]
    assert (np.diff(brightness) > 0).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fmt.count(12345), "12.3 k"),
        (fmt.count(999_999), "1.00 M"),
        (fmt.count(0), "0"),
        (fmt.count(None), "–"),
        (fmt.milliseconds(0.0123), "12.3 µs"),
        (fmt.milliseconds(0.99999), "1.00 ms"),
        (fmt.milliseconds(1500), "1.50 s"),
        (fmt.short_milliseconds(2.0), "2 ms"),
        (fmt.seconds(95), "95 s"),
        (fmt.seconds(125.4), "2 min 05 s"),
        (fmt.seconds(7320), "2 h 02 min"),
        (fmt.memory(3 * 2**20), "3.00 MiB"),
        (fmt.memory(12), "12 B"),
        (fmt.percent(0.9731), "97.3 %"),
        (fmt.percent(math.nan), "–"),
        (fmt.points(0.0213), "+2.1"),
        (fmt.points(-0.0213), "−2.1"),
        (fmt.points(-0.0001), "±0.0"),
        (fmt.probability(0.0004), "p < 0.001"),
        (fmt.probability(0.0344), "p = 0.034"),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert text.replace("\u202f", " ") == expected
