"""Mutation testing: a sample of small changes of the code, and whether a test fails with each.

Cosmic Ray makes the mutants. A mutant is tried with tests that execute its line: those of the module's own folder
first, then others, one of each file in turn. Without ``.coverage`` it is tried with the files of tests that have the
module's name, then with those of its folder, then with the laws of all methods. It is killed when a test fails that
passes without the change, ends in a crash or does not end. Two commands::

    pip install cosmic-ray pytest-cov
    pytest -n auto --dist loadscope --cov=conservtl --cov-context=test --cov-report=
    python benchmarks/mutants.py --sample 200

The first, which may be left out, leaves ``.coverage``, which knows the tests of each line. Results are stored mutant by
mutant in ``benchmarks/results/mutants.jsonl``; a repeated command goes on. ``--again`` tries survivors anew, with
``--also`` for tests that the coverage does not know yet. ``equivalent_mutants.json`` lists survivors that no test can
kill, and why.
"""

from __future__ import annotations

import argparse
import ast
import datetime as dt
import difflib
import itertools
import json
import platform
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import parso  # noqa: F401  # before Cosmic Ray, which imports its parts in an order that fails
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData
from mutant_trials import SECONDS_OF_A_PART, Copy

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
FOLDERS = ["methods", "kernels", "runtime", "plan", "layers"]
# Unions in annotations are no code, and decorators such as `abstractmethod` and `override` say nothing at run time.
LEFT_OUT = ("core/ReplaceBinaryOperator_BitOr", "core/ReplaceUnaryOperator_Delete", "core/RemoveDecorator")
MOST_TESTS = 60  # functions that a mutant is tried with
FIRST_TESTS = 12  # of them
OF_CLASSES = ["tests/test_layout.py::test_values_do_not_change", "tests/api", "tests/plan/test_decision.py"]
"""Tests of fields, defaults and signatures, which every import makes."""
OF_ALL = ["tests/testing", "tests/adaptation", "tests/test_conservation.py", "tests/compatibility"]
"""Tests of what all methods have in common."""

Row = dict[str, Any]


def mutants(path: Path) -> Iterator[Row]:
    """Yield every mutant of a module, as a place and an operator."""
    nodes = list(ast_nodes(get_ast(path.read_text(encoding="utf-8"))))
    for name in operator_names():
        if name.startswith(LEFT_OUT):
            continue
        cls = get_operator(name)
        if cls.arguments():
            continue
        places = (place for node in nodes for place in cls().mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            yield {
                "module": str(path.relative_to(ROOT)),
                "line": start[0],
                "operator": name.removeprefix("core/"),
                "occurrence": occurrence,
            }


def sample(everything: list[Row], count: int, chance: random.Random) -> list[Row]:
    """Return one mutant each of random places, so that an operator with many replacements does not weigh more."""
    places: dict[tuple[str, int, str], list[Row]] = {}
    for mutant in everything:
        places.setdefault((mutant["module"], mutant["line"], mutant["operator"].split("_")[0]), []).append(mutant)
    return [chance.choice(places[place]) for place in chance.sample(list(places), min(count, len(places)))]


def changed(mutant: Row) -> tuple[str, list[str]]:
    """Return a mutant's module, and the lines that differ."""
    source = (ROOT / mutant["module"]).read_text(encoding="utf-8")
    text = mutate_code(source, get_operator(f"core/{mutant['operator']}")(), mutant["occurrence"])
    diff = difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm="")
    return text, [row for row in diff if row[3:]][2:]


def parts_of(tests: list[str]) -> list[list[str]]:
    """Return tests in the parts in which they are run: most mutants need no more than the first."""
    return [tests[:FIRST_TESTS], tests[FIRST_TESTS:]]


def tests_by_name(module: str, line: int) -> list[list[str]]:
    """Return files of tests in the parts in which they are run: of the module's name, of its folder, and all others."""
    path = ROOT / module
    folder = Path("tests", Path(module).parts[1])
    names = {part.strip("_") for part in (path.stem, *path.parent.parts[len((ROOT / "conservtl").parts) + 1 :])}
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / folder).glob("test_*.py"))
    own = [file for file in files if any(name in file for name in names)]
    rest = [file for file in files if file not in own and "test_maps" not in file]
    rest.sort(key=lambda file: path.stem.strip("_") not in (ROOT / file).read_text(encoding="utf-8"))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = any(node.lineno <= line <= (node.end_lineno or line) for node in functions)
    return [own, [] if inside else OF_CLASSES, rest, OF_ALL]


def tests_of(module: str, line: int, data: CoverageData) -> list[str]:
    """Return tests that execute a line, or the module if none is known to: those nearest to the module first."""
    parts = Path(module).parts
    file = next((file for file in data.measured_files() if file.endswith(f"/{module}")), "")
    by_line = {number: {one.split("|")[0].split("[")[0] for one in told} - {""}
               for number, told in data.contexts_by_lineno(file).items()}  # fmt: skip
    found = by_line.get(line) or set().union(*by_line.values())
    by_file = [list(tests) for _, tests in itertools.groupby(sorted(found), lambda test: test.split("::")[0])]
    in_turn = [test for round_ in itertools.zip_longest(*by_file) for test in round_ if test is not None]
    own, folder = f"test_{parts[-1]}", "/".join(["tests", *parts[1:-1]])
    near = [test for test in in_turn if own in test.split("::")[0] or test.startswith(folder)]
    near.sort(key=lambda test: own not in test.split("::")[0])
    far = [test for test in in_turn if test not in set(near)]
    at_import = line in by_line and not by_line[line]
    chosen = [*(OF_CLASSES if at_import else []), *near[: MOST_TESTS // 2], *far[: MOST_TESTS // 2]]
    return chosen if found else [folder if (ROOT / folder).is_dir() else "/".join(["tests", parts[1]])]


def found_anew(row: Row) -> Row | None:
    """Return a mutant as it is in the code of now: the same change, nearest to its line; None: the code has changed."""
    same = [one for one in mutants(ROOT / row["module"]) if one["operator"] == row["operator"]]
    same.sort(key=lambda one: abs(one["line"] - row["line"]))
    return next((row | one for one in same if key({**one, "diff": changed(one)[1]}) == key(row)), None)


def key(row: Row) -> str:
    """Return the name of a mutant, which does not change when lines above it do."""
    return f"{row['module']}: " + " -> ".join(part[1:].strip() for part in row["diff"] if part[0] in "+-")


def table(rows: Sequence[Row], equivalent: Mapping[str, str]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Mutants",
        "",
        f"{platform.system()} {platform.machine()}, python {platform.python_version()}; {dt.datetime.now(dt.UTC):%F}.",
        f"Made by `python benchmarks/mutants.py` of random places in {', '.join(FOLDERS)}. Each mutant was tried with",
        f"up to {MOST_TESTS} test functions that execute its line, in two parts of {SECONDS_OF_A_PART} s of CPU time;",
        "of sample 3, with the files of tests of its module, its folder and all methods, 20 s each, and at first with",
        "no other test of the suite.",
        "Shares are of the mutants that a test can kill, with 95 % intervals (Wilson); those at first are of the tests",
        "as they stood when a mutant was first tried, those of now count survivors that were tried anew.",
        "",
        "| sample | folder | mutants | no test can | killed at first | killed now | survive | killed at first | now |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for seed in [*sorted({row["seed"] for row in rows}), "all"]:
        for folder in [*FOLDERS, "all"]:
            sampled = [row for row in rows if seed in {"all", row["seed"]}]
            part = [row for row in sampled if folder in {"all", Path(row["module"]).parts[1]}]
            same = sum(row["result"] == "survived" and key(row) in equivalent for row in part)
            first, now = (sum(row[when] == "killed" for row in part) for when in ("first", "result"))
            count = max(1, len(part) - same)
            shares = " | ".join(share(killed, count) for killed in (first, now))
            lines.append(
                f"| {seed} | {folder} | {len(part)} | {same} | {first} | {now} | {count - now} | {shares} |"
                if part
                else f"| {seed} | {folder} | 0 | 0 | 0 | 0 | 0 | – | – |"
            )
    lines += ["", "## Survivors", ""]
    for row in (row for row in rows if row["result"] == "survived"):
        change = " -> ".join(f"`{part[1:].strip()}`" for part in row["diff"] if part[0] in "+-")
        why = equivalent.get(key(row), f"None of {row['tests']} tests kills it.")
        lines.append(f"- {row['module']}:{row['line']} {change}. {why}")
    return "\n".join(lines) + "\n"


def share(part: int, whole: int) -> str:
    """Return a share in per cent with its 95 % interval after Wilson."""
    z, mean = 1.96, part / whole
    middle, spread = mean + z**2 / (2 * whole), z * (mean * (1 - mean) / whole + z**2 / (4 * whole**2)) ** 0.5
    low, high = (100 * (middle + sign * spread) / (1 + z**2 / whole) for sign in (-1, 1))
    return f"{100 * mean:.0f} % ({low:.0f} to {high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--again", action="store_true", help="try survivors anew instead, of all samples")
    parser.add_argument("--also", nargs="*", default=[], help="tests to try first")
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    data = CoverageData(str(options.coverage)) if options.coverage.exists() else None
    if data is not None:
        data.read()
    options.out.mkdir(parents=True, exist_ok=True)
    stored = options.out / "mutants.jsonl"
    rows: list[Row] = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []
    equivalent = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    if options.again:
        left = [row for row in rows if row["result"] == "survived" and key(row) not in equivalent]
        rows = [row for row in rows if row not in left]
        anew = [(row, found_anew(row)) for row in left]
        rows += [row for row, new in anew if new is None]  # whose code has changed: they count as surviving
        left = [new for _, new in anew if new is not None]
    else:
        modules = sorted(path for folder in FOLDERS for path in (ROOT / "conservtl" / folder).rglob("*.py"))
        everything = [mutant for path in modules for mutant in mutants(path)]
        print(f"{len(everything):,} mutants of {len(modules)} modules")
        chosen = sample(everything, options.sample, random.Random(options.seed))
        known = {key(row) for row in rows}
        left = [{**one, "seed": options.seed, "diff": changed(one)[1]} for one in chosen]
        left = [one for one in left if key(one) not in known]
    copy = Copy(ROOT)
    for number, mutant in enumerate(left, 1):
        place = mutant["module"], mutant["line"]
        parts = tests_by_name(*place) if data is None else parts_of(tests_of(*place, data))
        row = mutant | copy.outcome(mutant["module"], changed(mutant)[0], [options.also, *parts])
        rows.append({**row, "first": mutant.get("first", row["result"])})
        print(f"{number} of {len(left)}: {row['result']}  {key(row)}  ({row['tests']} tests, {row['by']})", flush=True)
        stored.write_text("".join(json.dumps(one) + "\n" for one in [*rows, *(left[number:] if options.again else [])]))
    (options.out / "mutants.md").write_text(table(rows, equivalent))
    print(table(rows, equivalent))


if __name__ == "__main__":
    main()
