"""Pictures as SVG for a page: one look, no global state, no clashing ids."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from conservtl.extras import require
from conservtl.fragments import figure_html
from conservtl.tasks.bad_files import shown_name

__all__ = [
    "DOMAIN_LOOKS",
    "GREY",
    "INK",
    "PALE",
    "SOURCE",
    "TARGET",
    "WIDTH",
    "Picture",
    "bare",
    "draw",
    "draw_png",
    "legend_above",
    "shorten",
]

# Okabe and Ito's palette, distinct with every common kind of colour blindness.
TARGET = "#0072B2"
SOURCE = "#D55E00"
INK = "#333333"
GREY = "#8A8A8A"
PALE = "#DDDDDD"

DOMAIN_LOOKS = {"target": (TARGET, "o", "-"), "source": (SOURCE, "s", "--")}
"""Domain -> colour, marker and stroke of its line."""

WIDTH = 9.6
"""Width of the page's column in inches: 9 points are 12 pixels on the page."""

_STYLE = {
    "font.family": ["sans-serif"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#EAEAEA",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    # Names of classes and layers may hold dollar signs and underscores: no formulas.
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Args:
        title: the question it answers, in a few words.
        caption: how to read it.
        svg: the drawing.
    """

    title: str
    caption: str
    svg: str

    def _repr_html_(self) -> str:
        return figure_html(self.title, self.caption, self.svg)


def draw(name: str, alt: str, height: float, paint: Callable[[Any], None]) -> str:
    """Draw on a figure of the page's width and return it as an ``<svg>`` element.

    ``name`` is unique on the page, so that ids of two drawings differ; ``alt`` is for screen readers; ``height`` is in
    inches.
    """
    with _style({"svg.hashsalt": name}):
        out = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _painted(height, paint).savefig(out, format="svg", metadata=metadata)
    return _embed(out.getvalue(), alt)


def draw_png(height: float, paint: Callable[[Any], None]) -> bytes:
    """Draw on a figure and return it as the content of a PNG file, on white."""
    with _style({}):
        out = io.BytesIO()
        _painted(height, paint).savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()


def _painted(height: float, paint: Callable[[Any], None]) -> Any:
    figure = require("matplotlib.figure", "report").Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04, wspace=0.1)
    paint(figure)
    return figure


def bare(axes: Any, *, grid: str) -> None:
    """Reduce axes to a grid along one direction, without tick marks."""
    axes.grid(visible=True, axis=grid)
    axes.tick_params(length=0)
    axes.spines["left" if grid == "x" else "bottom"].set_color(PALE)
    axes.spines["bottom" if grid == "x" else "left"].set_visible(False)


def legend_above(axes: Any, ncols: int, **spacing: float) -> None:
    """Write the names of lines and marks in a row above the axes."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, borderaxespad=0, **spacing)


def shorten(name: str, length: int) -> str:
    """Shorten a name to at most ``length`` characters.

    Leading parts of a dotted name shrink to their first letter, except numbers, which distinguish layers; if that is
    not enough, the middle is cut out. Characters that turn or break a line become escapes.

    Example:
        >>> shorten("encoder.layers.11.attention.out_proj", 24)
        'e.l.11.a.out_proj'
    """
    parts = (name := shown_name(name)).split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= length:
            break
        parts[place] = part if part.isdigit() else part[:1]
    name = ".".join(parts)
    if len(name) <= length:
        return name
    end = (length - 1) * 2 // 3
    return f"{name[: length - 1 - end]}…{name[-end:]}"


@contextmanager
def _style(more: Mapping[str, Any]) -> Iterator[None]:
    """Use this look instead of the user's matplotlibrc, and restore the settings afterwards."""
    matplotlib = require("matplotlib", "report")
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The bundled font lacks some characters; text stays text in SVG, and the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | dict(more))
        yield


def _embed(svg: str, alt: str) -> str:
    """Return the drawing as an element of a page, without parts that only a separate file needs."""
    svg = svg[svg.index("<svg") :].strip()
    # Comments, and a style element that would apply to the whole page.
    svg = re.sub(r"<!--.*?-->|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # Ids of groups ("axes_1") repeat in every drawing. Referenced ids are hashed with `svg.hashsalt`.
    svg = re.sub(r'(<\w+[^<>]*?)\sid="[\w.]+_\d+"', r"\1", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    start = f'<svg role="img" aria-label="{escape(alt)}" {view[0] if view else ""}>'
    return re.sub(r"<svg[^>]*>", lambda _: start, svg, count=1)  # as a function: names may hold backslashes
