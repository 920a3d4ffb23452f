"""``python -m tests.parity [--rtol 1e-4] [--key KEY] [--json] [-v] FILE…``: golden files through our code.

Prints ``KEY CASE max_abs max_rel PASS|FAIL`` a case; the exit status is 1 when one fails or cannot be run.
A folder stands for all .safetensors files below it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from tests.parity.core import Report, run_file


def _line(report: Report) -> str:
    if report.error is not None:
        return f"{report.key} {report.case} - - FAIL {report.error}"
    verdict = "PASS" if report.passed else "FAIL"
    line = f"{report.key} {report.case} {report.max_abs:.3e} {report.max_rel:.3e} {verdict}"
    worst = [f"{t.name} ({t.max_rel:.1e})" for t in report.tensors if not t.passed]
    return f"{line} {', '.join(worst)}" if worst else line


def main(arguments: list[str] | None = None) -> int:
    """Run the files and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="golden file, or a folder of them")
    parser.add_argument("--rtol", type=float, default=1e-4, help="relative tolerance (default 1e-4)")
    parser.add_argument("--key", help="the method, when the file's folder is not named after it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with every tensor")
    parser.add_argument("-v", "--verbose", action="store_true", help="every tensor's differences")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    failed = False
    for given in map(Path, options.files):
        for path in sorted(given.rglob("*.safetensors")) if given.is_dir() else [given]:
            report = run_file(path, options.rtol, options.key)
            failed |= not report.passed
            if options.json:
                print(json.dumps({**asdict(report), "passed": report.passed}), flush=True)
                continue
            print(_line(report), flush=True)
            if options.verbose:
                for t in report.tensors:
                    print(f"    {t.name} {t.max_abs:.3e} {t.max_rel:.3e} {'ok' if t.passed else 'FAIL'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
