"""The picture of a range test: loss against learning rate, with the suggested rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conservtl.errors import SpecError
from conservtl.report.figures.canvas import GREY, INK, SOURCE, TARGET, Picture, bare, draw, draw_png
from conservtl.report.pages.rendering import write_page
from conservtl.storage.files import write_bytes

__all__ = ["check_picture", "range_test_picture", "range_test_sentence", "write_range_test"]

_HEIGHT = 4.2
_KINDS = (".html", ".png")


def write_range_test(result: Mapping[str, Any], path: Path) -> None:
    """Write a range test as a page (``.html``) or as a picture (``.png``).

    Raises:
        SpecError: the file has another suffix.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    check_picture(path)
    if path.suffix == ".png":
        write_bytes(draw_png(_HEIGHT, lambda figure: _paint(figure, result)), path)
        return
    write_page(
        path,
        result,
        over="Range test",
        title="Which learning rate",
        sentence=range_test_sentence(result),
        parts=[range_test_picture(result)],
        notes=["The loss is that of the target alone. A lower rate keeps more of the source."],
    )


def range_test_picture(result: Mapping[str, Any]) -> Picture:
    """Draw the loss against the learning rate, with the suggested rate."""
    alt = f"The loss against the learning rate; suggested is {result['suggestion']:.1e}."
    caption = (
        "Dots: the loss at each step, while the rate grows from step to step. Line: averaged over neighbouring "
        f"steps. {_ended(result)}"
    )
    svg = draw("range", alt, _HEIGHT, lambda figure: _paint(figure, result))
    return Picture("Loss against learning rate", caption, svg)


def check_picture(path: Path) -> None:
    """Raise unless a file has the suffix of a page or picture, ``.html`` or ``.png``; called before time is spent."""
    if path.suffix not in _KINDS:
        raise SpecError(
            f"out: the picture must be a file .html or .png; received {str(path)!r}. Use one of these suffixes."
        )


def range_test_sentence(result: Mapping[str, Any]) -> str:
    """Return the suggested rate and the reason as a sentence."""
    return (
        f"A learning rate of {result['suggestion']:.1e} is suggested: a tenth of {10 * result['suggestion']:.1e}, "
        f"where the loss is lowest. It falls fastest at {result['steepest']:.1e}."
    )


def _ended(result: Mapping[str, Any]) -> str:
    last = f"{result['rates'][-1]:.1e}"
    return f"The loss diverged at {last}." if result["diverged"] else f"The test ended at {last} without diverging."


def _paint(figure: Any, result: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    rates, losses, smoothed = result["rates"], result["losses"], result["smoothed"]
    axes.plot(rates, losses, "o", color=GREY, markersize=3, alpha=0.6)
    axes.plot(rates, smoothed, color=TARGET)
    axes.set_xscale("log")
    axes.set_xlim(rates[0], rates[-1])
    low, high = min(losses), max(smoothed)
    axes.set_ylim(min(0.0, low), high + 0.25 * (high - low))
    marks = [("suggested", result["suggestion"], SOURCE, "-", 0.98), ("steepest", result["steepest"], INK, ":", 0.88)]
    for name, rate, colour, stroke, height in marks:
        axes.axvline(rate, color=colour, linestyle=stroke, linewidth=1.5)
        right = rate > (rates[0] * rates[-1]) ** 0.5
        axes.annotate(
            f"{name} {rate:.1e}",
            (rate, height),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if right else 6, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            color=colour,
            weight="bold" if name == "suggested" else "normal",
        )
    decades = range(math.ceil(math.log10(rates[0]) - 1e-9), math.floor(math.log10(rates[-1]) + 1e-9) + 1)
    axes.set_xticks([10.0**decade for decade in decades], [f"1e{decade}" for decade in decades])
    axes.set_xlabel("learning rate (of the optimizer; log scale)")
    axes.set_ylabel("loss, with the plan's terms")
    axes.minorticks_off()
    bare(axes, grid="y")
