"""The plan as a table by layer, for a terminal and for plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from conservtl.errors import agreeing, counted
from conservtl.fragments import fragment, html_table

if TYPE_CHECKING:
    from conservtl.plan.plan import Plan
    from conservtl.plan.row import Row

__all__ = ["HEADER", "as_html", "as_rich", "as_text", "beside", "lines", "named", "rows_by_label", "summary"]

HEADER = ("layer", "parameters", "origin", "state", "rate", "pull", "decay")


def lines(plan: Plan) -> list[tuple[str, ...]]:
    """Return a line for each layer, with a cell for each column of ``HEADER``."""
    trained = set(plan.trained)
    return [
        (
            layer,
            f"{sum(row.size for row in rows):,}",
            _origin(rows),
            _state(plan, rows, trained),
            _span([row for row in rows if row.name in trained], _rate),
            _span([row for row in rows if row.name in trained], lambda row: _strength(plan, row, "pull")),
            _span([row for row in rows if row.name in trained], lambda row: _decay(plan, row)),
        )
        for layer, rows in plan.by_layer()
    ]


def summary(plan: Plan) -> list[str]:
    """Return totals, reasons for fresh layers, remarks on the source, phases if there are several, and decisions."""
    total = plan.totals()
    share = 100 * total["trained"] / max(1, total["all"])
    every = counted(total["all"], "parameter")
    text = [
        f"{every}: {total['trained']:,} trained ({share:.1f} %), {total['frozen']:,} frozen",
        f"{total['copied']:,} copied from the source, {total['fresh']:,} fresh",
    ]
    text += [f"rows copied by label  {said}" for said in rows_by_label(plan).values()]
    text += [f"fresh  {layer}: {'; '.join(reasons)}" for layer, rows in plan.by_layer() if (reasons := _reasons(rows))]
    text += [f"tied  {said}" for said in _tied(plan)]
    text += [f"frozen as found  {_as_found(plan)}"] if any(row.as_found for row in plan.rows) else []
    text += [f"data  {note[6:]}" if note.startswith("data: ") else f"source  {note}" for note in plan.notes]
    if len(plan.phases) > 1:
        for number, phase in enumerate(plan.phases):
            frozen = plan.frozen_in(number)
            part = {row.layer for row in plan.rows if row.name in frozen}
            layers = dict.fromkeys(row.layer for row in plan.rows if row.name not in frozen)
            names = [f"{layer} (part)" if layer in part else layer for layer in layers]
            trains = named(names, 3)
            text.append(f"phase {number + 1}  {phase.name}: {phase.lasts}, rates × {phase.scale:g}, trains {trains}")
    text += [f"{moment}  {description}" for moment, description in beside(plan)]
    return text


def rows_by_label(plan: Plan) -> dict[str, str]:
    """Return layer -> how many of its rows are copied by label, for those that are not copied as they are."""
    rows = {row.layer: row for row in reversed(plan.rows) if row.source_rows is not None}
    return {layer: f"{layer}: {_rows(rows[layer])}" for layer in plan.layers if layer in rows}


def beside(plan: Plan) -> list[tuple[str, str]]:
    """Return the decisions that no column of the table shows: when each acts, and its description."""
    moments = (
        ("model", plan.extensions),
        ("before", (*plan.measures, *plan.searches)),
        ("loss", plan.terms),
        ("penalty", tuple(penalty for penalty in plan.penalties if penalty.column is None)),
        ("each step", plan.updates),
        ("after", plan.after),
    )
    return [
        (moment, f"{each.by}: {each.describe()}{', on changed copies of the inputs' * plan.on_proxies(each)}")
        for moment, decisions in moments
        for each in decisions
    ]


def as_text(plan: Plan) -> str:
    """Return the table in plain characters."""
    cells = [HEADER, *lines(plan)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    rule = "  ".join("─" * width for width in widths)
    body = [
        "  ".join(c.rjust(w) if i == 1 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in [body[0], rule, *body[1:], rule, *summary(plan)])


def as_rich(plan: Plan) -> Any:
    """Return the table as ``rich`` prints it to a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for name in HEADER:
        table.add_column(name, justify="right" if name == "parameters" else "left", no_wrap=True)
    for cells in lines(plan):
        style = "dim" if cells[3].startswith("frozen") else "yellow" if cells[2].startswith("fresh") else ""
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return Group(table, *(Text(line, style="italic") for line in summary(plan)))


def as_html(plan: Plan) -> str:
    """Return the table as notebooks show it; frozen layers are pale, fresh ones bold."""
    cells = lines(plan)
    marks = [
        "quiet" if row[3].startswith("frozen") else "strong" if row[2].startswith("fresh") else "" for row in cells
    ]
    text = frozenset(range(len(HEADER))) - {1}
    return fragment(html_table(HEADER, cells, text, marks), notes=summary(plan))


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Return why parameters of a layer are fresh, a reason for each module; those that strategies added come last."""
    first: dict[tuple[bool, str], str] = {}
    for row in rows:
        if row.reason:
            first.setdefault((row.added, row.name.rpartition(".")[0]), row.reason)
    return list(dict.fromkeys(first[key] for key in sorted(first, key=lambda key: key[0])))


def _origin(rows: Sequence[Row]) -> str:
    origins = {row.origin for row in rows}
    partly = len(origins) > 1 or ("source" in origins and any(row.fresh for row in rows))
    return "source, part fresh" if partly else origins.pop()


def _rows(row: Row) -> str:
    """Return how many rows are copied by label, and how many of the source's are not used."""
    every, left = len(row.source_rows or ()), len(row.unused_rows)
    unused = f" ({left} of the source's {(row.source_shape or (0,))[0]} not used)" if left else ""
    return f"{every - len(row.new_rows)} of {every}{unused}"


def _state(plan: Plan, rows: Sequence[Row], trained: set[str]) -> str:
    names = {row.name for row in rows}
    if not names & trained:
        return "frozen as found" if all(row.as_found for row in rows) else "frozen"
    phases = range(len(plan.phases))
    first = next(i for i in phases if names - plan.frozen_in(i))
    most = next((i for i in phases if not names & trained & plan.frozen_in(i)), first)
    state = "trained" if names <= trained and most == first else "part trained"
    text = state if first == 0 else f"{state} from phase {first + 1}"
    return text if most == first else f"{text}, {'all' if names <= trained else 'more'} from phase {most + 1}"


def named(layers: Sequence[str], most: int) -> str:
    """Return the names of layers, or of the first and the last with their number if there are more than ``most``."""
    return ", ".join(layers) if len(layers) <= most else f"{layers[0]} … {layers[-1]} ({len(layers)} layers)"


def _as_found(plan: Plan) -> str:
    """Return how much is frozen because it asked for no gradient when handed in, and where."""
    rows = [row for row in plan.rows if row.as_found]
    layers = list(dict.fromkeys(row.layer for row in rows))
    where = named(layers, 3)
    return f"{counted(sum(row.size for row in rows), 'parameter')} in {where}: no gradient was asked for when handed in"


def _tied(plan: Plan) -> list[str]:
    """Return which tensors have several names, those of the head first; a line for each of the first three."""
    heads = set(plan.tied_head) if any(row.aliases for row in plan.rows) else set()
    rows = sorted((row for row in plan.rows if row.aliases), key=lambda row: row.name not in heads)
    said = []
    for row in rows[:3]:
        also = " (the head)" if row.name in heads else ""
        names = " and ".join(row.aliases)
        said.append(f"{row.name} is {names}{also}: one tensor, with the rate, the pull and the phases of {row.layer}")
    more = len(rows) - len(said)
    return said + ([f"{counted(more, 'more tensor')} {agreeing(more, 'has')} several names"] if more else [])


def _rate(row: Row) -> str:
    return f"{row.lr:.3g}" if row.lr is not None else f"× {row.scale:.3g}"


def _strength(plan: Plan, row: Row, column: Literal["pull", "decay"]) -> str:
    """Return the strength in a column, the measurements that weigh it, its mode, and how often it acts."""
    acting = plan.penalties_on(row.name)
    penalty = next((one for one in acting if one.column == column), None)
    value: float | None = getattr(row, column)
    if value is None and column == "pull":
        shown = [(strength, one) for one in acting if (strength := one.pull_on(row)) is not None]
        value, penalty = shown[0] if shown else (None, None)
    if value is None:
        return ""
    cell = " × ".join((f"{value:.3g}", *(penalty.reads if penalty else ())))
    if penalty is None:
        return cell
    how = " decoupled" * (penalty.mode == "decoupled")
    return f"{cell}{how}" if penalty.every == 1 else f"{cell}{how}, every {penalty.every} steps"


def _decay(plan: Plan, row: Row) -> str:
    """Return the strength of plain L2, or whether the optimizer's own weight decay acts."""
    if row.decay is not None:
        return _strength(plan, row, "decay")
    return "optimizer's" if row.weight_decay and row.name not in plan.covered else ""


def _span(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    values = list(dict.fromkeys(text for text in map(cell, rows) if text))
    return "–" if not values else values[0] if len(values) == 1 else f"{values[0]} … {values[-1]}"
