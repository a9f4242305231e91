"""Draw the pictures of docs/idea.md: ``python docs/site/pictures.py`` writes docs/pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.patches import Rectangle
from results import number, settings

import conservtl as ctl
from conservtl.report.figures.canvas import GREY, INK, PALE, SOURCE, TARGET, bare, draw

_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'  # of a file of its own
PICTURES = Path(__file__).parents[1] / "pictures"


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, height, title, paint in (
        ("pull", 4.2, "Plain fine-tuning and L2-SP on a quadratic loss", pull),
        ("sides", 2.6, "Layers kept for a new speaker and for new classes", sides),
        ("rates", 2.4, "Learning rates of eight layers at a decay of 0.8", rates),
        ("plane", 4.6, "Target and source accuracy of all methods", plane),
    ):
        picture = draw(name, title, height, paint).replace("<svg ", f"<svg {_NAMESPACES} ", 1)
        (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")


def pull(figure: Any) -> None:
    """Two descents from w0 by the library itself, over the contours of the target's loss."""
    axes = figure.subplots()
    best, steep = torch.tensor([3.0, 1.6]), torch.tensor([0.1, 1.0])
    x, y = np.meshgrid(np.linspace(-0.6, 4, 200), np.linspace(-0.5, 2.4, 200))
    loss = 0.5 * (0.1 * (x - 3.0) ** 2 + (y - 1.6) ** 2)
    axes.contour(x, y, loss, levels=[0.02, 0.1, 0.25, 0.5, 0.9, 1.4], colors=PALE, linewidths=1)
    for label, strategies, colour in (
        ("plain fine-tuning", [], GREY),
        ("L2-SP, α = 0.1", [ctl.L2SP(alpha=0.1, on="all")], TARGET),
        ("L2-SP, α = 0.5", [ctl.L2SP(alpha=0.5, on="all")], "#009E73"),
    ):
        model = torch.nn.Linear(1, 2, bias=False)
        adaptation = ctl.adapt(model, {"weight": torch.zeros(2, 1)}, strategies)
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        path = [(0.0, 0.0)]
        for _ in range(1000):
            optimizer.zero_grad()
            (0.5 * steep * (model.weight[:, 0] - best) ** 2).sum().backward()
            optimizer.step()
            path.append(tuple(model.weight[:, 0].tolist()))
        axes.plot(*zip(*path, strict=True), color=colour, label=label)
        axes.plot(*path[-1], "o", color=colour)
    axes.plot(0, 0, "D", color=SOURCE)
    axes.annotate("w⁰, the source", (0, 0), (8, -12), textcoords="offset points", color=SOURCE)
    axes.annotate("w*, the target's minimum", (3, 1.6), (-10, 10), textcoords="offset points", color=INK)
    axes.set_aspect("equal")
    axes.legend(loc="lower right")
    axes.set_xlabel("flat direction: the examples say little")
    axes.set_ylabel("steep direction")
    bare(axes, grid="y")


def sides(figure: Any) -> None:
    """Two rows of layers, the kept ones filled."""
    axes = figure.subplots()
    rows = (
        ("a new speaker:\nsame words", [False] * 3 + [True] * 4, "kept: words do not depend on the voice"),
        ("new classes:\nsame kind of images", [True] * 4 + [False] * 3, "kept: edges and shapes are shared"),
    )
    for line, (told, kept, why) in enumerate(rows):
        y = -1.5 * line
        axes.text(-0.3, y + 0.35, told, ha="right", va="center", color=INK)
        for place, keep in enumerate(kept):
            colour = SOURCE if keep else TARGET
            box = {"facecolor": colour if keep else "white", "edgecolor": colour, "linewidth": 1.5}
            axes.add_patch(_rectangle(place, y, box))
        places = [place for place, keep in enumerate(kept) if keep]
        axes.text(sum(places) / len(places) + 0.4, y - 0.25, why, ha="center", va="center", color=SOURCE)
        rest = [place for place, keep in enumerate(kept) if not keep]
        axes.text(sum(rest) / len(rest) + 0.4, y - 0.25, "trained", ha="center", va="center", color=TARGET)
    axes.text(0, 1.1, "input side", color=INK)
    axes.text(6.8, 1.1, "output side", ha="right", color=INK)
    axes.set_xlim(-2.6, 7.2)
    axes.set_ylim(-2.0, 1.4)
    axes.axis("off")


def rates(figure: Any) -> None:
    """The rates of a real plan."""
    axes = figure.subplots()
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(8)))
    plan = ctl.adapt(model, {**model.state_dict()}, [ctl.DiscriminativeLR(decay=0.8)]).plan
    scales = [row.scale for row in plan.rows if row.kind == "weight"]
    axes.bar(range(1, 9), scales, color=TARGET, width=0.7)
    for place, scale in enumerate(scales, 1):
        axes.text(place, scale + 0.03, f"× {scale:.2f}", ha="center", color=INK)
    axes.set_xlabel("layer, from the input side")
    axes.set_ylabel("learning rate")
    axes.set_yticks([0, 1])
    axes.set_ylim(0, 1.15)
    bare(axes, grid="y")


def plane(figure: Any) -> None:
    """Every method of the benchmark in its three settings."""
    shown = settings()
    for axes, table in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for row in table.rows:
            target, source = number(row[1]), number(row[2])
            if target is None or source is None:
                continue
            plain = row[0].startswith("plain")
            axes.plot(source, target, "s" if plain else "o", color=GREY if plain else TARGET, markersize=4)
            if row[0] == "plain, rate 2e-3":
                axes.annotate(
                    row[0], (source, target), (0, 6), textcoords="offset points", fontsize=8, ha="center", color=INK
                )
        axes.set_title(table.heading, fontsize=9)
        axes.margins(x=0.25)
        axes.set_xlabel("source accuracy, %")
        bare(axes, grid="y")
    for mark, colour, label in (("s", GREY, "plain fine-tuning"), ("o", TARGET, "with a strategy")):
        figure.axes[0].plot([], [], mark, color=colour, markersize=4, label=label)
    figure.axes[0].legend(loc="lower left")
    figure.axes[0].set_ylabel("target accuracy, %")


def _rectangle(place: int, y: float, style: dict[str, Any]) -> Any:
    return Rectangle((place, y), 0.8, 0.7, **style)


if __name__ == "__main__":
    main()
