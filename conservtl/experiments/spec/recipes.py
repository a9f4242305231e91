"""Recipes: recommended strategies and training settings by name, the same for all targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conservtl.engine import Training
from conservtl.errors import SpecError, counted, did_you_mean
from conservtl.methods import AnyStrategy
from conservtl.methods.feature_conservation.strategy import FeatureConservation
from conservtl.methods.l2_sp import L2SP
from conservtl.methods.norm_adaptation.strategy import NormAdaptation
from conservtl.methods.output_conservation import OutputConservation
from conservtl.methods.weight_interpolation import WeightInterpolation
from conservtl.spec_model import FrozenModel

__all__ = ["RECIPES", "Recipe", "fill", "offer", "recipe"]


class Recipe(FrozenModel):
    """Strategies with their training settings. In a spec: ``strategies: {recipe: vision}``.

    ``adapt(model, source, recipe)`` takes both. ``print(recipe)`` says what a training loop of your own must call.
    """

    task: str
    """The task that it is for."""
    strategies: tuple[AnyStrategy, ...]
    """For ``adapt``."""
    training: Training
    """For ``fit``."""
    augment: dict[str, Any] | None = None
    """Augmentation of the shots, as a spec's ``data.augment``; None: the usual one for the data."""
    proxies: dict[str, Any] | None = None
    """Changes that make inputs to compare on of the shots, as a spec's ``data.proxies``; None: the shots themselves."""

    def __str__(self) -> str:
        """Return the strategies, the settings, and a loop with all that they need."""
        training = self.training
        cls, options = training.make()
        norms = "; batch norms keep their statistics" if training.batch_norm == "eval" else ""
        spread = f" / {training.accumulate}" if training.accumulate > 1 else ""
        compared = "outputs, inputs" if self.proxies is None else "model(others), others"
        calls = [
            ("adaptation = ctl.adapt(model, source, recipe)", f"the strategies{norms}"),
            ("adaptation.measure(batches)", "if adaptation.outstanding() names a measurement"),
            ("optimizer = adaptation.optimizer()", f"{cls.__name__}({_listed(options)})"),
            ("scheduler = adaptation.scheduler(steps=steps)", f"{training.schedule}; steps in all epochs together"),
            (f"for each of {counted(training.epochs, 'epoch')}, with batches of {training.known_batch_size}:", ""),
            ("    model.train()", "after each evaluation"),
            ("    adaptation.start_phase(i)", "where phase i of adaptation.plan.phases begins"),
            *([] if self.augment is None else [("    change the examples", f"augment: {_listed(self.augment)}")]),
            *([] if self.proxies is None else [("    others = changed copies", f"proxies: {_listed(self.proxies)}")]),
            (f"    loss = adaptation.loss(loss, {compared}){spread}", "adds what the strategies compare"),
            ("    loss.backward()", f"in {training.accumulate} batches a step" if spread else ""),
            *([] if training.clip is None else [("    adaptation.pull(); clip", f"norm {training.clip:g}")]),
            ("    optimizer.step(); scheduler.step(); optimizer.zero_grad()", ""),
            ("adaptation.finish(batches)", "the last step; batches of the training data"),
        ]
        width = max(len(call) for call, _ in calls)
        loop = [f"  {call.ljust(width)}  {'# ' * bool(note)}{note}".rstrip() for call, note in calls]
        strategies = [f"  {one.label}({_listed(one.model_dump(exclude_unset=True))})" for one in self.strategies]
        settings = f"  {_listed(training.model_dump(exclude_unset=True))}"
        fit = "ctl.fit(ctl.adapt(model, source, recipe), data) does this:"
        return "\n".join([f"strategies ({self.task})", *strategies, "training", settings, fit, *loop])


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
    "recognizer": Recipe(
        task="transcribe",
        strategies=(OutputConservation(weight=1.0, temperature=1.0), WeightInterpolation(t=0.85)),
        training=Training(
            epochs=60,
            batch_size=5,
            lr=1e-3,
            schedule="cosine",
            warmup=0.1,
            clip=1.0,
            batch_norm="eval",
            evaluate_every=60,
        ),
        augment={"speed": 0.1},
        proxies={
            "time_masks": 0,
            "frequency_masks": 0,
            "speed": 0.25,
            "frequency_stretch": 0.25,
            "frequency_shift": 0.1,
            "tilt": 0.5,
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


def _listed(fields: Mapping[str, Any]) -> str:
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in fields.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items() if name != "kind")


def recipe(name: str) -> Recipe:
    """Return recommended strategies and training settings by name, for ``adapt`` and ``fit``.

    ``speaker``: a word recognizer adapts to a new speaker. Each batch norm mixes a little of each recording's own
    statistics with the source's, every layer is trained on recordings that are stretched, tilted and shifted as by
    other voices and rooms, and the features of four layers are kept near the source's for the same recordings (DELTA).

    ``recognizer``: a recognizer of utterances adapts to a new speaker from a few sentences. It is trained in all layers
    at a large rate in small batches, on utterances masked and changed in speed. On copies of these that sound like
    other voices its answers stay near the source's, and the final weights are a point on the line between the source
    and the trained weights. It was measured on log-mel features; copies of samples differ in speed and pitch alone.

    ``vision``: the same labels, images of another quality. Each batch norm mixes the source's statistics with those
    of each image, every layer is trained at a large rate and pulled back to the source (decoupled L2-SP), and the
    final weights are a point on the line between the source and the trained weights.

    The settings were chosen on small networks; ``benchmarks/results`` has the measurements. For far fewer images
    raise the epochs; for a large network find a rate with ``conservtl lr-find``. Without batch norms their part is
    left out.

    ``fit(adapt(model, source, recipe), data)`` carries out all of a recipe but its augmentation and proxies, which it
    takes as functions. In a training loop of
    your own, call what ``print(recipe)`` lists: ``adaptation.optimizer()`` and ``adaptation.scheduler(steps=...)`` have
    its rates and schedule, batch norms its treatment, ``adaptation.loss(...)`` adds its terms and
    ``adaptation.finish(batches)`` is its last step.

    Args:
        name: ``speaker``, ``recognizer`` or ``vision``.

    Raises:
        SpecError: there is no recipe of this name.

    Example:
        >>> import conservtl as ctl
        >>> [strategy.kind for strategy in ctl.recipe("vision").strategies]
        ['norm_adaptation', 'l2_sp', 'weight_interpolation']
    """
    if not isinstance(name, str) or name not in RECIPES:
        near = did_you_mean(str(name), RECIPES)
        raise SpecError(f"recipe must be one of {', '.join(RECIPES)}; received {name!r}.{near}")
    return RECIPES[name]


def fill(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a spec's content with its recipe written out; fields that the spec sets win.

    Raises:
        SpecError: there is no such recipe, it is for another task, or ``strategies`` has other fields beside its name.
    """
    section = content.get("strategies")
    if not isinstance(section, Mapping):
        return content
    if "kind" in section:
        shown = ", ".join(f"{name}: {value}" for name, value in section.items())
        raise SpecError(f"strategies: must be a list; received the fields of one. Write [{{{shown}}}].")
    if set(section) != {"recipe"}:
        raise SpecError(
            f"strategies: a list, or a recipe by name alone, {{recipe: {' | '.join(RECIPES)}}}; "
            f"received {dict(section)}. To change a part of a recipe, write its strategies out as in a run's spec.yaml."
        )
    chosen = recipe(section["recipe"])
    training = content.get("training") or {}
    if not isinstance(training, Mapping):
        raise SpecError(f"training must hold fields of its own, such as training.epochs; received {training!r}.")
    if content.get("task", chosen.task) != chosen.task:
        fit = [name for name, one in RECIPES.items() if one.task == content["task"]]
        raise SpecError(
            f"strategies.recipe: {section['recipe']!r} is for {chosen.task}, and the task is {content['task']}. "
            f"Use {' or '.join(fit) or 'a list of strategies'}."
        )
    filled = dict(content)
    filled["strategies"] = [one.model_dump(mode="json") for one in chosen.strategies]
    filled["training"] = chosen.training.model_dump(exclude_unset=True) | dict(training)
    data = content.get("data")
    if isinstance(data, Mapping):
        changes = {"augment": chosen.augment, "proxies": chosen.proxies}
        filled["data"] = {**data, **{name: _merged(one, data.get(name, {})) for name, one in changes.items() if one}}
    return filled


def _merged(chosen: Mapping[str, Any], given: Any) -> Any:
    """Return a recipe's fields with those that a spec gives; anything else than fields wins."""
    return {**chosen, **given} if isinstance(given, Mapping) else given


def offer(schema: dict[str, Any]) -> None:
    """Let the JSON schema of a list of strategies accept the name of a recipe instead."""
    listed = {key: schema.pop(key) for key in ("type", "items") if key in schema}
    named = {"recipe": {"enum": list(RECIPES), "description": "Recommended strategies and training settings."}}
    by_name = {"type": "object", "properties": named, "required": ["recipe"], "additionalProperties": False}
    schema["anyOf"] = [listed, by_name]
