"""A page for each strategy, from its docstring, its fields and the committed benchmarks."""

from __future__ import annotations

import inspect
import re
from html import escape
from typing import Any

from formulas import markdown_of
from results import Table, number, settings, tables

from conservtl.methods import Strategy

__all__ = ["method_page", "sections"]

_SECTION = re.compile(r"^(Cost|Hurts|Measured|Raises|Reference|Example|Note):[ ]*", re.MULTILINE)

_FREE = "Nothing is added to a step, and nothing is kept."


def sections(docstring: str) -> dict[str, str]:
    """Return a docstring by section; the text in front of the first is under an empty name."""
    parts = _SECTION.split(docstring)
    return {"": parts[0], **{name: inspect.cleandoc(f"\n{text}") for name, text in zip(parts[1::2], parts[2::2])}}  # noqa: B905


def method_page(cls: type[Strategy]) -> str:
    """Return the Markdown of a strategy's page."""
    told = sections(markdown_of(inspect.getdoc(cls) or ""))
    parts = [f"# {cls.__name__}", told[""].strip(), _names(cls)]
    cost = _measured_cost(cls.__name__)
    parts += ["## Cost", _sentence(told.get("Cost", _FREE)), *cost]
    parts += [f"It hurts {told['Hurts']}"] if "Hurts" in told else []
    parts += ["## Fields", _fields(cls), "## Measured", *_measured(cls.__name__)]
    if "Raises" in told:
        parts += ["## Raises", re.sub(r"^(\w+): ", r"- **\1**: ", told["Raises"], flags=re.MULTILINE)]
    parts += ["## Example", f"```pycon\n{told['Example']}\n```", "## Reference", told["Reference"]]
    return "\n\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _names(cls: type[Strategy]) -> str:
    short = [f"`{name}`" + (f" (presets {_preset(fields)})" if fields else "") for name, fields in cls.aliases.items()]
    also = f" Short names: {', '.join(short)}." if short else ""
    return f"In a spec: `kind: {cls.model_fields['kind'].default}`. In Python: `ctl.{cls.__name__}(...)`.{also}"


def _preset(fields: Any) -> str:
    return ", ".join(f"`{name}: {value}`" for name, value in fields.items())


def _fields(cls: type[Strategy]) -> str:
    rows = []
    signature = inspect.signature(cls)
    for name, field in cls.model_fields.items():
        if name == "kind":
            continue
        default = "required" if field.is_required() else f"`{signature.parameters[name].default!r}`"
        text = " ".join((field.description or "").replace("``", "`").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {text} |")
    return "\n".join(["| field | default | |", "| --- | --- | --- |", *rows]) if rows else "It has none."


def _measured_cost(name: str) -> list[str]:
    """The benchmark's first network; it has one table of weights and one of whole steps."""
    network = next(table.heading for table in tables("conservation.md") if table.columns[0] != "asked for")
    found = [table.of(name).markdown() for table in tables("conservation.md") if table.heading == network]
    parts = [text for text in found if text]
    told = f"Measured, {network} ([other networks, and how](../results/conservation.md)):"
    return [told, *parts] if parts else []


def _measured(name: str) -> list[str]:
    """The gain over plain fine-tuning in three settings, with a picture of the target and the source apart."""
    gain = next(tables("methods.md")).of(name)
    if not gain.rows:
        return ["Not measured by itself in [the benchmark of all methods](../results/methods.md)."]
    told = (
        "Difference to the best plain learning rate in the harmonic mean of target and source accuracy, in points, "
        "with half of the 95 % interval ([how](../results/methods.md)):"
    )
    pictures = [_plane(table, name) for table in settings()]
    return [told, gain.markdown(), f'<div class="planes">{"".join(pictures)}</div>']


def _plane(table: Table, name: str) -> str:
    """Return one setting as SVG: the target's accuracy upwards, the source's to the right, a mark for each method."""
    points = [
        (row[0], source, target)
        for row in table.rows
        if (target := number(row[1])) is not None and (source := number(row[2])) is not None
    ]
    mine = {row[0] for row in table.of(name).rows}
    lows = [min(point[axis] for point in points) for axis in (1, 2)]
    highs = [max(point[axis] for point in points) for axis in (1, 2)]
    spans = [max(high - low, 1.0) for low, high in zip(lows, highs, strict=True)]
    marks = []
    for label, source, target in sorted(points, key=lambda point: point[0] in mine):
        x = 40 + 190 * (source - lows[0]) / spans[0]
        y = 190 - 150 * (target - lows[1]) / spans[1]
        colour, radius = ("#0072B2", 6) if label in mine else ("#BBBBBB", 4)
        title = f"<title>{escape(label)}: target {target:g} %, source {source:g} %</title>"
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">{title}</circle>')
    text = (
        f'<text x="40" y="16" font-weight="bold">{escape(table.heading)}</text>'
        f'<text x="135" y="226" text-anchor="middle">source accuracy, %</text>'
        f'<text x="40" y="211">{lows[0]:g}</text><text x="230" y="211" text-anchor="end">{highs[0]:g}</text>'
        f'<text x="30" y="44" text-anchor="end">{highs[1]:g}</text>'
        f'<text x="30" y="194" text-anchor="end">{lows[1]:g}</text>'
        f'<text x="0" y="32">target accuracy, %</text>'
    )
    frame = '<path d="M34 36V196H236" fill="none" stroke="#8A8A8A"/>'
    shown = f"{name} among all methods, {table.heading}"
    return f'<svg viewBox="0 0 250 232" role="img" aria-label="{escape(shown)}">{frame}{"".join(marks)}{text}</svg>'
