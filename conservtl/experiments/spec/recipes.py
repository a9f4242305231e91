"""Recipes: what conservtl does when told nothing more than the task, one set of settings for all targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conservtl.engine import Training
from conservtl.errors import SpecError
from conservtl.methods import AnyStrategy
from conservtl.methods.feature_conservation.strategy import FeatureConservation
from conservtl.methods.l2_sp import L2SP
from conservtl.methods.norm_adaptation.strategy import NormAdaptation
from conservtl.methods.weight_interpolation import WeightInterpolation
from conservtl.spec_model import FrozenModel

__all__ = ["RECIPES", "Recipe", "fill", "offer", "recipe"]


class Recipe(FrozenModel):
    """Strategies, and how to train with them. In a spec: ``strategies: {recipe: vision}``."""

    task: str
    """The task that it is for."""
    strategies: tuple[AnyStrategy, ...]
    """For ``adapt``."""
    training: Training
    """For ``fit``."""
    augment: dict[str, Any] | None = None
    """Random changes of the shots, as a spec's ``data.augment``; None: what is usual for the data."""


RECIPES = {
    "speaker": Recipe(
        task="speech",
        strategies=(
            NormAdaptation(train="all", statistics="instance", prior=9, required=False),
            FeatureConservation(metric="delta", alpha=0.005),
        ),
        training=Training(epochs=300, lr=1e-3, schedule="cosine", warmup=0.05, batch_norm="eval", evaluate_every=20),
        augment={
            "time_shift": 0.1,
            "time_stretch": 0.15,
            "frequency_shift": 0.03,
            "frequency_stretch": 0.1,
            "tilt": 0.15,
            "noise": 0.15,
        },
    ),
    "vision": Recipe(
        task="vision",
        strategies=(
            NormAdaptation(train="all", statistics="instance", prior=5, required=False),
            L2SP(mode="decoupled", alpha=15),
            WeightInterpolation(t=0.75),
        ),
        training=Training(epochs=25, batch_size=32, lr=2e-3, schedule="cosine", batch_norm="eval", evaluate_every=5),
    ),
}
"""Name -> recipe."""


def recipe(name: str) -> Recipe:
    """What conservtl does when told nothing more, for a loop of your own.

    ``speaker``: a word recogniser meets a new speaker. Each batch norm mixes a little of each recording's own
    statistics with the source's, everything is trained on recordings that are stretched, tilted and shifted as other
    voices and rooms would, and the features of four layers are held to what the source makes of the same (DELTA).

    ``vision``: the same labels, images of another quality. Each batch norm mixes the source's statistics with those
    of the image it sees, everything is trained at a large rate and pulled back to the source (decoupled L2-SP), and
    the end is a point on the line between the source and the trained weights.

    Both were measured on small networks: recordings of ten words, one and five of each, and 25 images of each of ten
    classes (benchmarks/results), where their settings were chosen too; of the five corruptions measured, two took no
    part in that. Far fewer images want more epochs, a large network a rate of its own (``conservtl
    lr-find``); one without batch norms goes without their part.

    Args:
        name: ``speaker`` or ``vision``.

    Raises:
        SpecError: there is none of this name.

    Example:
        >>> import conservtl as ctl
        >>> [strategy.kind for strategy in ctl.recipe("vision").strategies]
        ['norm_adaptation', 'l2_sp', 'weight_interpolation']
    """
    if name not in RECIPES:
        raise SpecError(f"recipe must be one of {', '.join(RECIPES)}; received {name!r}.")
    return RECIPES[name]


def fill(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A spec's content with its recipe written out; what stands in it beside the recipe wins.

    Raises:
        SpecError: there is no such recipe, it is for another task, or something stands beside its name.
    """
    asked = content.get("strategies")
    if not isinstance(asked, Mapping):
        return content
    if set(asked) != {"recipe"}:
        raise SpecError(
            f"strategies: a list, or a recipe by name alone, {{recipe: {' | '.join(RECIPES)}}}; got {dict(asked)}. "
            "To change a part of a recipe, write its strategies out as a run's spec.yaml has them."
        )
    found = recipe(asked["recipe"])
    if content.get("task", found.task) != found.task:
        fit = [name for name, one in RECIPES.items() if one.task == content["task"]]
        raise SpecError(
            f"strategies.recipe: {asked['recipe']!r} is for {found.task}, and the task is {content['task']}. "
            f"Use {' or '.join(fit) or 'a list of strategies'}."
        )
    filled = dict(content)
    filled["strategies"] = [one.model_dump(mode="json") for one in found.strategies]
    filled["training"] = found.training.model_dump(exclude_unset=True) | dict(content.get("training") or {})
    data = content.get("data")
    if found.augment is not None and isinstance(data, Mapping):
        own = data.get("augment", {})
        filled["data"] = {**data, "augment": {**found.augment, **own} if isinstance(own, Mapping) else own}
    return filled


def offer(schema: dict[str, Any]) -> None:
    """Let the JSON schema of a list of strategies take the name of a recipe in its place."""
    listed = {key: schema.pop(key) for key in ("type", "items") if key in schema}
    named = {"recipe": {"enum": list(RECIPES), "description": "What conservtl does when told nothing more."}}
    by_name = {"type": "object", "properties": named, "required": ["recipe"], "additionalProperties": False}
    schema["anyOf"] = [listed, by_name]
