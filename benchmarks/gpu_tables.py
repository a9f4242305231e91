"""Tables of ``gpu.py``."""

from __future__ import annotations

from typing import Any

import conservation as base

__all__ = ["TABLES"]


def weight_lines(name: str, found: dict[str, Any]) -> list[str]:
    size = f"{found['parameters'] / 1e6:.1f} million in {found['tensors']} tensors"
    lines = [
        f"## On weights: {name}, {size}, floor {found['floor ms']:.3f} ms",
        "",
        "| around a step | ms | of the floor | wanted at most | host waits | temporary, MiB |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for method, row in found["rows"].items():
        wanted = "" if row["wanted"] is None else f"{row['wanted']:g}"
        ratio = base.formatted(row["of the floor"])
        peak = base.bytes_of(row["peak"])
        lines.append(f"| {method} | {row['ms']:.3f} | {ratio} | {wanted} | {row['waits']} | {peak} |")
    return [*lines, ""]


def bus_lines(name: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## Anchors on the CPU: {name}, one copy of them {found['copy ms']:.2f} ms",
        "",
        "| L2SP | ms | of the copy | wanted at most | host waits |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for mode, row in found["rows"].items():
        lines.append(f"| {mode} | {row['ms']:.2f} | {base.formatted(row['of the copy'])} | 1.1 | {row['waits']} |")
    return [*lines, ""]


def step_lines(name: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## In a step: {name}, batch of {found['batch']}, {found['size']} pixels",
        "",
        "| method | plain step, ms | of a plain step | host waits | memory more than plain, MiB |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for method, row in found["rows"].items():
        if "refused" in row:
            lines.append(f"| {method} | | refused: {row['refused'].split('.')[0]} | | |")
            continue
        ratio, memory = base.formatted(row["of a plain step"], 3), base.bytes_of(row["memory"])
        lines.append(f"| {method} | {row['plain ms']:.2f} | {ratio} | {row['waits']} | {memory} |")
    return [*lines, ""]


def engine_lines(name: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## The engine: {name}, batches of {found['batch']}, {found['rounds']} rounds",
        "",
        "| loop | examples/s | of the plain loop by hand | compared with | ratio | wanted at least | peak, MiB |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for loop, row in found["rows"].items():
        ratio = "" if row["ratio"] is None else base.formatted(row["ratio"], 3)
        cells = [
            loop,
            f"{row['examples a second']['median']:.0f}",
            "" if row["of the loop by hand"] is None else base.formatted(row["of the loop by hand"]),
            row["compared with"] or "",
            ratio,
            row["wanted"] or "",
            base.bytes_of(row["peak"]),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def recipe_lines(_: str, found: dict[str, Any]) -> list[str]:
    """Scores of each seed, and the mean difference of the devices beside the spread over seeds."""
    devices = found["devices"]
    lines = [
        "## Recipes: the same specs on each device",
        "",
        f"| recipe | side | {' | '.join(devices)}, by seed | mean difference | spread over seeds |",
        f"| --- | --- | {' | '.join('---' for _ in devices)} | ---: | ---: |",
    ]
    for recipe, seeds in found["rows"].items():
        for side in ("target", "source"):
            scores = {one: [by_device[one][side] for by_device in seeds.values()] for one in devices}
            shown = [", ".join(f"{score:.3f}" for score in values) for values in scores.values()]
            pairs = list(zip(scores[devices[-1]], scores[devices[0]], strict=True))
            difference = sum(one - other for one, other in pairs) / len(pairs)
            spread = max(scores[devices[0]]) - min(scores[devices[0]])
            lines.append(f"| {recipe} | {side} | {' | '.join(shown)} | {difference:+.3f} | {spread:.3f} |")
    return [*lines, ""]


TABLES = {
    "weights": weight_lines,
    "bus": bus_lines,
    "steps": step_lines,
    "engine": engine_lines,
    "recipes": recipe_lines,
}
