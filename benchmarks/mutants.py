"""Mutation testing: a sample of small changes of the code, and whether a test fails with each.

Cosmic Ray makes the mutants. A mutant is tried with the tests that execute its line, those of the module's own folder
first, and is killed when one fails, ends in an error or does not end. Two commands::

    pip install cosmic-ray pytest-cov
    pytest -n auto --dist loadscope --cov=conservtl --cov-context=test --cov-report=
    python benchmarks/mutants.py --sample 200

The first leaves ``.coverage``, which knows the tests of each line. Results are stored mutant by mutant in
``benchmarks/results/mutants.jsonl``; a repeated command goes on. ``EQUIVALENT`` lists survivors that no test can kill.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime as dt
import difflib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parso  # noqa: F401  # before Cosmic Ray, which imports its parts in an order that fails
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FOLDERS = ["methods", "kernels", "runtime", "plan", "layers"]
# Unions in annotations are no code, and decorators such as `abstractmethod` and `override` say nothing at run time.
LEFT_OUT = ("core/ReplaceBinaryOperator_BitOr", "core/ReplaceUnaryOperator_Delete", "core/RemoveDecorator")
SECONDS = 240
EQUIVALENT: dict[str, str] = {}


def mutants(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every mutant of a module, as a place and an operator."""
    tree = get_ast(path.read_text(encoding="utf-8"))
    for name in operator_names():
        if name.startswith(LEFT_OUT):
            continue
        cls = get_operator(name)
        if cls.arguments():
            continue
        places = (place for node in ast_nodes(tree) for place in cls().mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            yield {
                "module": str(path.relative_to(ROOT)),
                "line": start[0],
                "operator": name.removeprefix("core/"),
                "occurrence": occurrence,
            }


def sample(everything: list[dict[str, Any]], count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Return one mutant each of random places, so that an operator with many replacements does not weigh more."""
    places: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for mutant in everything:
        places.setdefault((mutant["module"], mutant["line"], mutant["operator"].split("_")[0]), []).append(mutant)
    return [chance.choice(places[place]) for place in chance.sample(list(places), min(count, len(places)))]


def tests_of(module: str, line: int, data: CoverageData) -> list[str]:
    """Return the tests that execute a line, those of the module's own folder first."""
    folder = "/".join(["tests", *Path(module).parts[1:2]])
    contexts = data.contexts_by_lineno(str(ROOT / module)).get(line, [])
    found = sorted({context.split("|")[0].split("[")[0] for context in contexts} - {""})
    return sorted(found, key=lambda test: not test.startswith(folder)) or [folder]


def outcome(mutant: dict[str, Any], tests: list[str]) -> dict[str, Any]:
    """Return the mutant with its change, and what its tests said."""
    source = (ROOT / mutant["module"]).read_text(encoding="utf-8")
    changed = mutate_code(source, get_operator(f"core/{mutant['operator']}")(), mutant["occurrence"])
    diff = [
        row for row in difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm="") if row[3:]
    ][2:]
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        copy = Path(folder) / "project"
        ignore = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "runs", "results")
        shutil.copytree(ROOT, copy, ignore=ignore, symlinks=True)
        (copy / mutant["module"]).write_text(changed, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
            result, last = ("survived" if done.returncode == 0 else "killed"), done.stdout.strip().splitlines()[-2:]
        except subprocess.TimeoutExpired:
            result, last = "timeout", []
    return {**mutant, "diff": diff, "tests": len(tests), "result": result, "last": last}


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Mutants",
        "",
        f"{platform.system()} {platform.machine()}, python {platform.python_version()}; {dt.datetime.now(dt.UTC):%F}.",
        f"Made by `python benchmarks/mutants.py --sample {options.sample} --seed {options.seed}`: mutants that Cosmic",
        f"Ray makes of random places in {', '.join(FOLDERS)}.",
        "",
        "| folder | mutants | killed | no test can | survived | killed of those that can be |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for folder in [*FOLDERS, "all"]:
        part = [row for row in rows if folder in {"all", Path(row["module"]).parts[1]}]
        survived = [row for row in part if row["result"] == "survived"]
        same = [row for row in survived if key(row) in EQUIVALENT]
        killed = len(part) - len(survived)
        share = 100 * killed / max(1, len(part) - len(same))
        lines.append(
            f"| {folder} | {len(part)} | {killed} | {len(same)} | {len(survived) - len(same)} | {share:.1f} % |"
        )
    lines += ["", "## Survivors", ""]
    for row in rows:
        if row["result"] == "survived":
            change = " -> ".join(f"`{part[1:].strip()}`" for part in row["diff"] if part[0] in "+-")
            lines.append(f"- {row['module']}:{row['line']} {change}. {EQUIVALENT.get(key(row), 'No test kills it.')}")
    return "\n".join(lines) + "\n"


def key(row: dict[str, Any]) -> str:
    """Return the name of a mutant, which does not change when lines above it do."""
    return f"{row['module']}: " + " -> ".join(part[1:].strip() for part in row["diff"] if part[0] in "+-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.coverage.exists():
        raise SystemExit(f"{options.coverage} does not exist. Run the tests with --cov-context=test first.")
    data = CoverageData(str(options.coverage))
    data.read()
    modules = sorted(path for folder in FOLDERS for path in (ROOT / "conservtl" / folder).rglob("*.py"))
    everything = [mutant for path in modules for mutant in mutants(path)]
    print(f"{len(everything):,} mutants of {len(modules)} modules")
    chosen = sample(everything, options.sample, random.Random(options.seed))
    options.out.mkdir(parents=True, exist_ok=True)
    stored = options.out / "mutants.jsonl"
    rows = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []
    known = {(row["module"], row["operator"], row["occurrence"]) for row in rows}
    left = [mutant for mutant in chosen if (mutant["module"], mutant["operator"], mutant["occurrence"]) not in known]
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool, stored.open("a") as file:
        waiting = [pool.submit(outcome, mutant, tests_of(mutant["module"], mutant["line"], data)) for mutant in left]
        for done in concurrent.futures.as_completed(waiting):
            rows.append(done.result())
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print(f"{len(rows)} of {len(chosen)}: {rows[-1]['result']}  {key(rows[-1])}", flush=True)
    (options.out / "mutants.md").write_text(table(rows, options))
    print(table(rows, options))


if __name__ == "__main__":
    main()
