"""The command line as a user meets it: output, exit status, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from torchconv import __version__
from torchconv.cli import main

COMMANDS = (
    "compare",
    "inspect",
    "swap",
    "merge",
    "factorise",
    "parallelise",
    "export",
    "list",
    "show",
    "search",
    "claim",
    "bench",
)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"torchconv {__version__}\n")


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    for command in COMMANDS:
        assert command in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"torchconv {command}" in out


def test_list_and_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    methods = json.loads(run(capsys, "list", "--json")[1])
    assert len(methods) == 58
    assert {m["state"] for m in methods} <= {"ready", "planned"}
    parts = json.loads(run(capsys, "list", "--kind", "operator", "--json")[1])
    assert {"conv", "dcls", "lsnet"} <= {p["name"] for p in parts}
    shown = json.loads(run(capsys, "show", "dcls", "--json")[1])
    assert shown["method"]["arxiv"] == "2112.03740"
    assert any(p["target"] == "DCLSConv" for p in shown["parts"])


def test_show_says_how_to_import(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "show", "inceptionnext")[1]
    assert "from torchconv.ops import" in out
    assert "InceptionDWConv2d" in out


def test_names_and_links_are_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = run(capsys, "list", "--kind", "operator")[1]
    assert {"multikernel-reparam", "terminator-global"} <= {line.split(" ")[1] for line in out.splitlines()}
    assert max(map(len, out.splitlines())) <= 60
    shown = run(capsys, "show", "dcls")[1]
    assert "K-H-Ismail/Dilated-Convolution-with-Learnable-Spacings-PyTorch (MIT)" in shown
    monkeypatch.delenv("COLUMNS")  # a pipe
    (row,) = [line for line in run(capsys, "list")[1].splitlines() if line.split()[:1] == ["dcls"]]
    assert len(row) > 80


def test_search_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    hits = json.loads(run(capsys, "search", "prune", "--json")[1])
    assert {h["key"] for h in hits[:2]} == {"masksparsity", "betarank"}
    assert run(capsys, "search", "qqqq")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "dclss"], "did you mean dcls"),
        (["list", "--kind", "operatr"], "did you mean operator"),
        (["list", "--family", "x"], "family"),
        (["compare", "--ops", "conv,dlcs"], "did you mean dcls"),
        (["compare", "--net", "huge"], "mini, resnet or timm"),
        (["compare", "--resume"], "--out"),
        (["compare", "--time-budget", "soon"], "90s, 10m, 2h"),
        (["compare", "--data", "no/such/place", "--out", "never"], "no/such/place"),
        (["compare", "--seeds", "0"], "--seeds"),
        (["bench", "mixers", "--size", "big"], "56x56"),
        (["bench", "ops", "--ops", "dlcs"], "did you mean dcls"),
        (["claim", "nope"], "no claim of that name"),
        (["claim", "dcls", "--budget", "huge"], "budget"),
        (["merge", "", "-o", "x"], "model='': give timm:NAME"),
        (["export", "timm:"], "model='timm:': put a name behind the colon"),
        (["factorise", "torchconv:", "--rank", "0.5", "-o", "x"], "model='torchconv:': put a name behind"),
        (["parallelise", "timm:qqqqqqqq", "-o", "x"], "has no network like it"),
        (["merge", "torchconv:eca_resnet18", "-o", ""], "is empty"),
        (["swap", "timm:test_resnet", "--to", "dcls:9", "-o", "x"], "as in dcls:kernel_size=9"),
        (["export", "torchconv:eca_resnet18", "-o", "."], "out='.': is a folder; name a file in it"),
        (["export", "torchconv:eca_resnet18", "-o", f"{__file__}/x.onnx"], "is a file; name another folder"),
        (["bench", "ops", "--plot", "."], "plot='.': is a folder"),
        (["claim", "dcls", "--out", __file__], "is a file; name another folder"),
        (["inspect", "timm:test_resnet", "-o", "page"], "as in page.html"),
        (["inspect", "timm:test_resnet", "--weights", "none.pth"], "weights='none.pth': is no file"),
        (["inspect", "timm:test_resnet", "--against-weights", "x.pth"], "against_weights='x.pth': needs --against"),
        (
            ["inspect", "timm:test_resnet", "--against", "torchconv:eca_resnet18", "--against-weights", "pretrained"],
            "against_weights='pretrained': is for timm:NAME",
        ),
        (["frobnicate"], "No such command"),
        (["list", "--frobnicate"], "No such option"),
    ],
)
def test_errors_are_one_line_and_exit_status_two(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("torchconv: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["swap --to dcls", "merge", "factorise --rank 0.5", "parallelise"])
def test_a_place_that_cannot_be_written_is_refused_before_work(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    name, *options = command.split()
    code, _, err = run(capsys, name, "torchconv:no_such_network", *options, "-o", str(tmp_path / "file"))
    assert code == 2
    assert "is a file" in err


def test_a_missing_package_names_its_extra() -> None:
    from torchconv._common.extras import extra_of

    assert (extra_of("scipy"), extra_of("sklearn.svm"), extra_of("nonesuch")) == ("compare", "compare", None)


def test_an_interruption_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchconv.weights.check_place", interrupt)
    code, _, err = run(capsys, "merge", "torchconv:eca_resnet18", "-o", "never")
    assert (code, err) == (130, "interrupted\n")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="dclss"):
        main(["show", "dclss", "--debug"])


def test_compare_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "--ops",
        "conv,depthwise",
        "--net",
        "mini:depth=1:base=8",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--limit",
        "200",
    ]
    command = [sys.executable, "-m", "torchconv", "compare", *options, "--jobs", "1", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "report: run/report.html" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["command"].startswith("torchconv compare --ops conv,depthwise")
    assert str(tmp_path) not in (tmp_path / "run" / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *command[3:])
    assert code == 2
    assert "--resume" in err


def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ["--ops", "conv,inceptionnext", "--channels", "8", "--size", "8x8", "--batch", "1", "--out", str(out)]
    code, text, _ = run(capsys, "bench", "mixers", *options, "--json")
    assert code == 0
    rows = json.loads(text)["rows"]
    assert [r["op"] for r in rows] == ["conv", "inceptionnext"]
    assert all(r["forward_ms"] > 0 and r["training_ms"] > 0 and r["macs"] > 0 for r in rows)
    assert json.loads(out.read_text())["rows"] == rows


def test_lists_can_be_piped(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"key", "says", "source"} <= json.loads(run(capsys, "claim", "--json")[1])[0].keys()


def test_import_is_light() -> None:
    code = "import sys, torchconv; print(len([m for m in ('torch', 'timm', 'typer', 'numpy') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
