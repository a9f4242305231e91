"""Lines and branches of the package that the tests execute, folder by folder.

Two commands write ``benchmarks/results/covered.{json,md}``::

    pytest -n auto --dist loadscope --cov --cov-report=
    python benchmarks/covered.py

Processes that tests start count too (``tool.coverage`` in ``pyproject.toml``); what needs a GPU runs on one alone.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import coverage
import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")
LOW = 90.0  # per cent, below which a module is listed
ON_A_GPU = re.compile(r"cuda|GRAPHS|self\._side|pinned|_recurrent")
"""Conditions that hold where there is a GPU alone: of CUDA and its graphs, side streams and pinned memory."""
PROGRAMS = "kernels/fused/programs/"  # Triton's, of which the interpreter executes some of the variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / ".coverage")
    parser.add_argument("--note", default="", help="to print with the table")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    measured = coverage.Coverage(data_file=options.data, config_file=ROOT / "pyproject.toml")
    measured.load()
    with tempfile.TemporaryDirectory() as folder:
        measured.json_report(outfile=f"{folder}/report.json")
        report = json.loads(Path(folder, "report.json").read_text())
    modules = {name: {key: entry["summary"][key] for key in COUNTS} for name, entry in report["files"].items()}
    on_a_gpu = {name: lines for name, entry in report["files"].items() if (lines := _on_a_gpu(name, entry))}
    machine = f"{platform.system()} {platform.machine()}; python {platform.python_version()}, torch {torch.__version__}"
    found = {"machine": f"{machine}; {dt.datetime.now(dt.UTC):%F}", "note": options.note, "modules": modules}
    found |= {"on a GPU alone": on_a_gpu}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "covered.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "covered.md").write_text(table(found))
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """Return the counts as Markdown: folder by folder, then the modules with the lowest shares."""
    folders: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    for name, counts in found["modules"].items():
        parts = Path(name).parts
        place = parts[parts.index("conservtl") + 1 :]
        for folder in (place[0] if len(place) > 1 else "modules beside the folders", "all"):
            for key in COUNTS:
                folders[folder][key] += counts[key]
    lines = [
        "# Tests: lines and branches",
        "",
        f"{found['machine']}. Made by `python benchmarks/covered.py`. {found['note']}".rstrip(),
        "",
        "| folder | lines | executed | branches | taken | lines and branches together |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for folder in [*sorted(folders.keys() - {"all"}), "all"]:
        counts = folders[folder]
        parts = [_share(counts["covered_lines"], counts["num_statements"])]
        parts.append(_share(counts["covered_branches"], counts["num_branches"]))
        lines.append(
            f"| {folder} | {counts['num_statements']:,} | {parts[0]} | {counts['num_branches']:,} | {parts[1]} | "
            f"{_share(*_both(counts))} |"
        )
    low = {name: _both(counts) for name, counts in found["modules"].items()}
    low = {name: both for name, both in low.items() if both[1] and 100 * both[0] / both[1] < LOW}
    lines += ["", f"Modules below {LOW:g} %:", ""]
    lines += [f"- {name}: {_share(*both)} of {both[1]}" for name, both in sorted(low.items())] or ["- none"]
    missed = folders["all"]["num_branches"] - folders["all"]["covered_branches"]
    lines += ["", f"Branches not taken: {missed}. Those of these lines are taken on a GPU alone:", ""]
    lines += [f"- {name}: {', '.join(map(str, places))}" for name, places in found["on a GPU alone"].items()]
    return "\n".join(lines) + "\n"


def _on_a_gpu(name: str, entry: dict[str, Any]) -> list[int]:
    """Return the lines of a module from which a branch is taken on a GPU alone."""
    source = Path(name).read_text(encoding="utf-8").splitlines()
    missed = dict.fromkeys(line for line, _ in entry["missing_branches"])
    return [line for line in missed if PROGRAMS in name or ON_A_GPU.search(source[line - 1])]


def _both(counts: dict[str, int]) -> tuple[int, int]:
    return (
        counts["covered_lines"] + counts["covered_branches"],
        counts["num_statements"] + counts["num_branches"],
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


if __name__ == "__main__":
    main()
