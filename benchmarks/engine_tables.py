"""Tables of ``engine.py``."""

from __future__ import annotations

from typing import Any

from engine_measuring import formatted

__all__ = ["CACHED", "FROZEN", "table"]

CACHED, FROZEN = "fit, half frozen, outputs cached", "fit, half frozen, computed in each step"


def table(name: str, part: dict[str, Any]) -> list[str]:
    lines = [
        f"## {name}",
        "",
        conditions(part),
        "",
        f"| variant | steps/s, median step | of the {part['base']}: by step | whole time |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {variant} | {row['rate']['median']:.1f} | {formatted(row['step'])} | {formatted(row['whole'])} |"
            for variant, row in part["variants"].items()
        ),
        *(f"| {variant} | not installed | | |" for variant in part["missing"]),
        "",
        "| variant | compared with | by step | whole time | goal |",
        "| --- | --- | ---: | ---: | ---: |",
        *(
            f"| {row['of']} | {row['base']} | {formatted(row['step'])} | {formatted(row['whole'])} | "
            f"{row['goal'] or ''} |"
            for row in part["ratios"]
        ),
        "",
    ]
    lines += part["in turn"] and [
        "| steps made in turn in one process | compared with | step by step | goal |",
        "| --- | --- | ---: | ---: |",
        *(f"| {row['of']} | {row['base']} | {formatted(row['step'])} | {row['goal']} |" for row in part["in turn"]),
        "",
    ]
    if (count := part.get("operations")) is None:
        return lines
    saving = (
        f"With {part['frozen']} layers frozen on the input side, caching their outputs makes a step "
        f"{part['ratios'][-1]['step']['median']:.2f} times as fast. By the number of operations, it could be "
        f"{count[FROZEN] / count[CACHED]:.2f}: {count[FROZEN] / 1e6:.0f} million multiply-adds a step without, "
        f"{count[CACHED] / 1e6:.0f} with, {count['all layers trained'] / 1e6:.0f} if all layers are trained."
    )
    return [*lines, saving, ""]


def conditions(part: dict[str, Any]) -> str:
    place = part["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in place["versions"].items())
    return (
        f"{part['method']} AdamW, fp32. Medians over {part['rounds']} rounds of {part['epochs']} epochs, each with all "
        f"variants in a random order; quartiles in brackets. {place['cpu']}, {place['cores']} cores, "
        f"{place['threads']} torch threads, load {place['load before']} before and {place['load after']} after; "
        f"{versions}; {place['date']}."
    )
