"""Specs from strangers: valid ones, nearly valid ones, and ones that mean harm. Made by a seed.

``python tests/faults/hostile.py --specs 10000 --seed 0`` reads them all and prints a line of JSON.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from conservtl.errors import InputError
from conservtl.experiments.spec.spec import load_spec

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGEST_MESSAGE, LONGEST_SECONDS = 20_000, 15.0

# fmt: off
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**4000, 0.0, -0.5, 1e308, float("inf"), float("nan"),
    "", " ", "yes", "0017", "2024-13-01", "12:30", "~", "null", "speech", "vision", "l2_sp", "*", "**", "[", "(?P<",
    "a" * 5000, "b" * 300 + ".pt", "\u0000", "\ud800", "\u202e", "../../etc/passwd", "/proc/self/mem", "/dev/zero",
    "http://[", "hf:a/b", "timm:", "{x}", "${HOME}", "$(id)", "__import__('os')", "%s%n", [], {}, [[]], [None],
    {"kind": None}, {"kind": []}, {"kind": {"kind": "l2_sp"}}, {"recipe": []}, {"recipe": {}}, {"recipe": "speaker"},
    {"range": [1, 0]}, {"choices": []}, {"up_to": -1}, {"": ""}, {"a" * 3000: 1},
    {str(number): number for number in range(300)}, list(range(300)),
]
TEXTS = [
    "!!bool maybe", "!!int abc", "!!timestamp abc", "!!python/object/apply:os.system [id]", "!!binary x", "&a [*a]",
    "*a", "<<: *a", "{" * 500, "[" * 500, "9" * 5000, "0x" + "f" * 9000, "1e999", "\t", "\x00", "\x85", "\ufeff", "---",
    "...", "%YAML 1.1", "? ", "- ", ": ", "'", '"', "#", "|", ">", "@", "`", "\\", "a: b: c", "\n  ", "2001-01-01",
    "0o17", "1_0", "+.inf",
]
# fmt: on
BOMBS = [
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9))
    + "task: *j\nstrategies: [{kind: nonsense, x: *j}]\n",
    "task: speech\n" + "".join(f"key{number}: 1\n" for number in range(4000)),
    "task: speech\nx: " + "[" * 1000 + "]" * 1000,
    "task: " + "a" * 10_000_000,
    "task: speech\nlayers: [" + "a," * 100_000 + "]",
]


def valid() -> list[dict[str, Any]]:
    """Return the content of the examples."""
    files = [*EXAMPLES.glob("speech/*.yaml"), *EXAMPLES.glob("vision/*.yaml")]
    return [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(files)]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value."""
    items: Any = (
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(content: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Return the content with one to three values replaced, removed, repeated or renamed."""

    def value() -> Any:  # a copy: the next change may act in it
        return copy.deepcopy(chance.choice(VALUES))

    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 3)):
        found = list(places(content))
        if not found:
            break
        *path, last = chance.choice(found)
        section: Any = content
        for key in path:
            section = section[key]
        how = chance.choice(["replace", "replace", "replace", "remove", "rename", "repeat", "add"])
        if how == "remove":
            del section[last]
        elif how == "rename" and isinstance(section, dict):
            section[f"{last}{chance.choice(['z', '_', ' ', chr(0x430)])}"] = section.pop(last)
        elif how == "repeat" and isinstance(section, list):
            section += [copy.deepcopy(section[last])] * chance.randint(1, 50)
        elif how == "add" and isinstance(section, dict):
            section[chance.choice(["extra", "kind", "range", "import", "__class__", "x" * 500])] = value()
        else:
            section[last] = value()
    return content


def garbled(text: str, chance: random.Random) -> str:
    """Return the text with one to three parts inserted, cut or exchanged."""
    for _ in range(chance.randint(1, 3)):
        at, to = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        how = chance.choice(["insert", "insert", "cut", "swap"])
        if how == "insert":
            text = text[:at] + chance.choice(TEXTS) + text[at:]
        elif how == "cut":
            text = text[:at] + text[min(to, at + 40) :]
        else:
            text = text[:at] + "".join(chance.sample(text[at : at + 20], len(text[at : at + 20]))) + text[at + 20 :]
    return text


def specs(count: int, seed: int) -> Iterator[bytes]:
    """Yield specs: a tenth valid, half of the others changed as data, half as text, and every bomb once."""
    chance, known = random.Random(seed), valid()
    yield from (bomb.encode() for bomb in BOMBS)
    for _ in range(count - len(BOMBS)):
        content = chance.choice(known)
        kind = chance.random()
        if kind >= 0.1:
            content = changed(content, chance)
        try:
            text = json.dumps(content) if chance.random() < 0.3 else yaml.safe_dump(content, allow_unicode=True)
        except ValueError:  # a number of more digits than Python prints
            text = "seed: " + "9" * 5000
        yield (garbled(text, chance) if kind > 0.55 else text).encode("utf-8", "surrogatepass")


def outcome(path: Path) -> tuple[str, str]:
    """Return what reading a spec ends in, and the message."""
    begun = time.process_time()
    try:
        load_spec(path)
        ended, message = "read", ""
    except InputError as error:
        ended, message = "refused", str(error)
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        ended, message = "failed", f"{type(error).__name__}: {error}"
    if time.process_time() - begun > LONGEST_SECONDS:
        ended = "slow"
    if ended == "refused" and (len(message) > LONGEST_MESSAGE or not message.strip()):
        ended = "message"
    return ended, message


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Read specs; return how many ended in which way, and the first that ended in a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        for content in specs(options.specs, options.seed):
            path.write_bytes(content)
            ended, message = outcome(path)
            counts[ended] += 1
            if ended not in ("read", "refused") and len(wrong) < 10:
                wrong.append({"ended": ended, "message": message[:500], "spec": repr(content[:1500])})
    return {"counts": dict(counts), "wrong": wrong}


if __name__ == "__main__":
    found = main()
    print(json.dumps(found, indent=1))  # noqa: T201 - a script
    sys.exit(bool(found["wrong"]))
