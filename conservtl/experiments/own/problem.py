"""A problem that a program holds: how models are made, the source, the data and the functions; checked once."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, get_args

import torch
from pydantic import ValidationError
from torch import nn

from conservtl.adaptation.prepare import adapt
from conservtl.batches import map_tensors, to_device
from conservtl.data import Data, first_batch, length_of
from conservtl.engine import Training
from conservtl.engine.criterion import KNOWN_DIRECTIONS, Criterion, check_metric
from conservtl.engine.evaluation import Functions, check_metrics
from conservtl.engine.randomness import preserve_rng
from conservtl.errors import DataError, SourceError, SpecError, did_you_mean
from conservtl.experiments.own.data import as_data, as_held_out, targets_in
from conservtl.experiments.own.setting import OwnSetting
from conservtl.experiments.own.settings import OwnData, OwnModel, OwnSpec
from conservtl.experiments.own.task import OwnSets, OwnTask
from conservtl.experiments.run.source_labels import check_shots
from conservtl.experiments.run.source_training import SourceModel
from conservtl.experiments.spec.spec import SourceSection
from conservtl.functions import Forward, Loss, Metrics, accuracy, cross_entropy, labels_of, logits_of
from conservtl.functions import forward as plain_forward
from conservtl.labels import labels_for_loss
from conservtl.layers import named_parameters, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.plan.plan import Plan
from conservtl.report.text.metrics import metric_named
from conservtl.runtime.preserve import eval_mode, preserve_buffers
from conservtl.runtime.source_model import build_source_model
from conservtl.source.itself import Itself, check_own, own_values
from conservtl.source.positions import resample_positions
from conservtl.source.read import Source, SourceLike, read_source
from conservtl.tasks.base import Shift
from conservtl.tasks.headline import Headline

__all__ = ["ModelLike", "OwnProblem", "ProblemOptions", "hold", "settings_of"]

ModelLike = nn.Module | Callable[[], nn.Module]
"""A model, which is copied for each run and left as it is; or a function that returns a new one."""

_NUMBERS = itertools.count(1)
_BATCH = 2  # examples that models are tried on


class ProblemOptions(TypedDict, total=False):
    """What a study may know of a problem beside model, source and data; every entry is optional."""

    valid: Any
    """Examples to select on, never a test part; or the part of ``train`` to select on, such as 0.2."""
    source_data: Any
    """Source examples for joint training, the distance of the domains, and measurements such as a Fisher."""
    shots: int | None
    """Examples of each class to adapt with, drawn anew for each seed; None: all of ``train``."""
    labels: tuple[Sequence[Any], Sequence[Any]] | None
    """As for ``adapt``: the labels of the model's and of the source's outputs, in order."""
    fresh: Sequence[str] | Mapping[str, str]
    """As for ``adapt``."""
    allow: Sequence[str]
    """As for ``adapt``."""
    layers: Sequence[str] | None
    """As for ``adapt``."""
    head: Sequence[str] | None
    """As for ``adapt``."""
    example: Any
    """As for ``adapt``; without it the inputs of the first examples."""
    key: str | None
    """As for ``adapt``."""
    prefix: str | None
    """As for ``adapt``."""
    rename: Mapping[str, str] | None
    """As for ``adapt``."""
    forward: Forward
    """As for ``fit``."""
    loss: Loss
    """As for ``fit``."""
    metrics: Metrics
    """As for ``fit``; ``training.select`` names the one that runs are judged by, if it is not the accuracy."""
    augment: Callable[[Any, torch.Generator], Any] | None
    """As for ``fit``."""
    optimizer: Any
    """As for ``fit``."""
    shift: Shift
    """How the target differs from a source of the same labels, for a recommendation: ``"input"`` or ``"speaker"``."""
    usual_lr: float
    """A rate that fits the model, for a recommendation."""


@dataclass(frozen=True, eq=False)
class OwnProblem:
    """A problem that a program holds.

    Args:
        number: of the problem in this process.
        make: makes a new model; draws from the global generators alone.
        filled: whether the model that ``make`` returns may hold trained values.
        task: functions and data.
        start: the source model and the source as it was read.
        fresh: globs of parameters or layers that do not start from the source -> reason.
        headless: parameters of the head that the source lacks -> reason.
        allow: as for ``adapt``.
        example: inputs that find the order of layers.
        optimizer: as for ``fit``.
    """

    number: int
    make: Callable[[], nn.Module]
    filled: bool
    task: OwnTask
    start: SourceModel
    fresh: Mapping[str, str]
    headless: Mapping[str, str]
    allow: tuple[str, ...]
    example: Any
    optimizer: Any

    def setting(self, spec: Any) -> OwnSetting:
        """Return the setting of a run.

        Raises:
            DataError: a class has fewer examples than shots.
        """
        domains = self.task.load(spec.data, spec.model, seed=spec.seed, source=spec.source.data is not None)
        return OwnSetting(spec, domains, self.example, domains.labels == domains.source_labels, self)

    def source(self) -> SourceModel:
        """Return the source model."""
        return self.start


def settings_of(
    problem: OwnProblem,
    training: Training | None,
    *,
    seed: int,
    strategies: Sequence[Any] = (),
    options: ProblemOptions,
) -> OwnSpec:
    """Return the settings of runs of a problem.

    Args:
        problem: the problem.
        training: settings of ``fit``; None: the defaults.
        seed: of the first run.
        strategies: of every run.
        options: ``shots``, ``valid``, ``layers`` and ``head`` among them count.
    """
    valid, layers, head = options.get("valid"), options.get("layers"), options.get("head")
    shots = options.get("shots")
    return OwnSpec(
        model=OwnModel(number=problem.number, head=None if head is None else tuple(head)),
        data=OwnData(
            target=next(iter(problem.task.sets.train)),
            shots="all" if shots is None else shots,
            validation=float(valid) if isinstance(valid, (int, float)) else 0.0,
        ),
        source=SourceSection(data=None if problem.task.sets.source_train is None else "auto"),
        layers=None if layers is None else tuple(layers),
        strategies=tuple(strategies),
        training=training or Training(),
        seed=seed,
    ).holding(problem)


def hold(
    model: ModelLike,
    source: SourceLike | Itself,
    train: Any,
    held_out: Mapping[str, Any] | None,
    training: Training | None,
    options: ProblemOptions,
) -> OwnProblem:
    """Return what a program hands over as a problem; everything is tried once, and nothing of it is changed.

    Args:
        model: a model or a function that makes one.
        source: as for ``adapt``.
        train: labelled target examples, or target -> examples.
        held_out: {"target": examples, or target -> examples, "source": examples}; None: none are needed.
        training: names the metric to judge by.
        options: see ``ProblemOptions``.

    Raises:
        InputError: one of its kinds; the message says what to change.
    """
    if unknown := sorted(options.keys() - ProblemOptions.__annotations__.keys()):
        names = ProblemOptions.__annotations__
        raise SpecError(f"{unknown[0]!r} is none of the options {', '.join(names)}.{did_you_mean(unknown[0], names)}")
    _check_forms(training, options)
    sets, tests = _sets(train, held_out, options)
    functions = Functions(
        options.get("forward", plain_forward), options.get("loss", cross_entropy), options.get("metrics", accuracy)
    )
    batch = first_batch(next(iter(sets.values())), _BATCH)
    example = options.get("example")
    if example is None and functions.forward is plain_forward:
        example = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, Mapping) else batch[0]
    with preserve_rng():
        make = _maker(model)
        bare = make()
        read, missing = _read(bare, source, options)
        fresh = missing | _declared(options.get("fresh", ()))
        known = {name: options.get(name) for name in ("layers", "head")} | {"allow": tuple(options.get("allow", ()))}
        plan = adapt(
            deep_copy(bare),
            read,
            fresh=fresh,
            labels=options.get("labels"),
            example=example,
            **known,  # type: ignore[arg-type]
        ).plan
        if isinstance(source, nn.Module) and source is model:
            check_own(plan, replace(read, module=unwrap(source)), source)
        head = [row for row in plan.rows if row.name in plan.possible_head]
        lacking = [row.name for row in head if row.source_shape is None or row.name in missing]
        headless = {name: missing.get(name, "not among the source's tensors") for name in lacking}
        outputs, metrics = _tried(bare, functions, batch)
        start = SourceModel(_source_model(bare, read, plan, fresh).eval(), 0, "given", read=read)
        theirs = None if headless else _outputs(start.model, functions, batch)
    classes = bool(accuracy(outputs, batch)) and labels_of(batch).ndim == 1
    own_head = any(row.fresh for row in head)
    labels = _labels(options.get("labels"), outputs, theirs, classes=classes, own_head=own_head)
    if headless and tests["source"] is not None:
        raise SourceError(
            f"held_out: the source model is scored on 'source', and it has no head: {next(iter(headless))!r} is "
            f"{next(iter(headless.values()))}. Give a source model with its own head, or leave 'source' out."
        )
    task = OwnTask(
        functions,
        OwnSets(sets, tests["target"], tests["valid"], tests["source_train"], tests["source"], *labels),
        _headline(training, metrics),
        make,
        options.get("augment"),
        classes=classes,
        shift=options.get("shift", "input"),
        usual_lr=options.get("usual_lr", OwnTask.usual_lr),
    )
    problem = OwnProblem(
        number=next(_NUMBERS),
        make=make,
        filled=isinstance(model, nn.Module) or isinstance(source, Itself),
        task=task,
        start=replace(start, outputs=len(labels[1])),
        fresh=fresh,
        headless=headless,
        allow=tuple(options.get("allow", ())),
        example=example,
        optimizer=options.get("optimizer"),
    )
    for target in sets:
        whole = OwnData(target=target, shots="all")
        check_shots(task, task.load(whole, OwnModel(), seed=0, source=True))
    return problem


def _check_forms(training: Any, options: ProblemOptions) -> None:
    """Raise unless settings, functions and number of shots have the types that they must have."""
    if training is not None and not isinstance(training, Training):
        raise SpecError(
            f"training must be a ctl.Training; received {type(training).__name__}. Write ctl.Training(epochs=...)."
        )
    for name in ("forward", "loss", "metrics", "augment"):
        value = options.get(name)
        if not callable(value) and (value is not None or (name != "augment" and name in options)):
            raise SpecError(
                f"{name} must be a function, as for fit; received {value!r:.60}. Pass one, or leave it out."
            )
    if (shift := options.get("shift", "input")) not in get_args(Shift):
        raise SpecError(f"shift must be one of {', '.join(get_args(Shift))}; received {shift!r:.60}. Give one of them.")
    if (rate := options.get("usual_lr")) is not None and not 0 < rate < math.inf:
        raise SpecError(f"usual_lr must be a finite rate above 0; received {rate!r}. Give one, or leave it out.")
    shots = options.get("shots")
    try:
        OwnData(shots="all" if shots is None else shots)
    except ValidationError as error:
        raise SpecError(
            f"shots must be a number of examples of each class, 1 at least, or 'all', or {{'up_to': a number}}; "
            f"received {shots!r:.60}. Give one, or leave it out to adapt with all of train."
        ) from error


def _sets(
    train: Any, held_out: Mapping[str, Any] | None, options: ProblemOptions
) -> tuple[dict[str, Data], dict[str, Any]]:
    """Return the training data of each target, and all other sets, in the forms that studies take."""
    sets = {name: as_data(data, "train") for name, data in targets_in(train).items()}
    held_out = {} if held_out is None else held_out
    if not isinstance(held_out, Mapping) or not held_out.keys() <= {"target", "source"}:
        received = sorted(held_out) if isinstance(held_out, Mapping) else type(held_out).__name__
        raise DataError(f"held_out must be {{'target': data, 'source': data}}; received {received}. Name these sets.")
    valid = options.get("valid")
    if isinstance(valid, bool) or (isinstance(valid, (int, float)) and not 0 <= valid < 1):
        raise DataError(f"valid must be examples, or a part of train in [0, 1); received {valid!r}.")
    given = None if isinstance(valid, (int, float)) else valid
    named: dict[str, Any] = {}
    for name, value in (("target", held_out.get("target")), ("valid", given)):
        found = {} if value is None else targets_in(value)
        named[name] = {target: as_held_out(data, name) for target, data in found.items()}
        if found and named[name].keys() != sets.keys():
            raise DataError(
                f"{'held_out' if name == 'target' else 'valid'} must have a set for each target of train "
                f"({', '.join(sets)}); received {', '.join(found)}. Name the same targets."
            )
    if not named["target"]:
        named["target"] = sets  # nothing is scored
    source, data = held_out.get("source"), options.get("source_data")
    named["source"] = None if source is None else as_held_out(source, "held_out['source']")
    named["source_train"] = None if data is None else as_data(data, "source_data")
    for name, each in {f"train {target}": data for target, data in sets.items()}.items():
        if length_of(each) == 0:
            raise DataError(f"{name}: there must be examples to adapt with; received none. Give at least one.")
    return sets, named


def _maker(model: ModelLike) -> Callable[[], nn.Module]:
    """Return a function that makes a new model, which nothing else holds."""
    if isinstance(model, nn.Module):
        return lambda: deep_copy(model)
    if not callable(model):
        raise SpecError(
            f"model must be a torch.nn.Module, or a function that returns one; received {type(model).__name__}."
        )
    last: list[nn.Module] = []

    def make() -> nn.Module:
        try:
            inspect.signature(model).bind()
        except TypeError as error:
            raise SpecError(
                f"model must be a function without arguments, which is called for each run; calling it: {error}. Pass "
                "lambda: network(...)."
            ) from error
        except ValueError:  # a builtin without a signature
            pass
        made = model()
        if not isinstance(made, nn.Module):
            raise SpecError(f"model() must return a torch.nn.Module; it returns {type(made).__name__}.")
        if last and made is last[0]:
            raise SpecError(
                "model() must return a new model in each call, because every run trains its own; it returns the same "
                "one again. Pass the model itself, which is copied, or build it inside the function."
            )
        last[:] = [made]
        return made

    return make


def _read(model: nn.Module, source: SourceLike | Itself, options: ProblemOptions) -> tuple[Source, dict[str, str]]:
    """Return the source, read once, and parameter -> reason of those that it says are missing."""
    names = {name: options.get(name) for name in ("key", "prefix", "rename")}
    if not isinstance(source, Itself):
        read = read_source(source, **names)  # type: ignore[arg-type]
        return (read if read.module is None else replace(read_source(deep_copy(read.module)), notes=read.notes)), {}
    if any(names.values()):
        raise SpecError("key, prefix and rename say how to read a source; the model itself is none. Leave them out.")
    read, missing = own_values(model, source)
    kept = {name: tensor.detach().clone() for name, tensor in read.tensors.items()}
    return replace(read, tensors=kept, module=None), missing


def _declared(fresh: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(fresh, str):
        raise SpecError(f"fresh must be a list of globs; received the text {fresh!r}. Write fresh=[{fresh!r}].")
    return dict(fresh) if isinstance(fresh, Mapping) else dict.fromkeys(fresh, "declared fresh by fresh=[...]")


def _source_model(model: nn.Module, read: Source, plan: Plan, fresh: Mapping[str, str]) -> nn.Module:
    """Return a model with the source's values, those of a head of another shape included."""
    matched = read.matched(model)
    wanted = {name: parameter for name, parameter in named_parameters(model).items() if name not in plan.possible_head}
    resampled, _ = resample_positions(model, matched.tensors, wanted)
    names = [row.name for row in plan.rows if row.origin == "source" and not row.fresh and row.name not in fresh]
    built = build_source_model(model, matched.as_model_has(resampled), names)
    if not isinstance(built, nn.Module):
        raise SourceError(
            "source: studies copy a source model, and a model with an adapter of PEFT shares its own. Pass the model "
            "without the adapter."
        )
    return built


def _tried(model: nn.Module, functions: Functions, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model's outputs for a batch, and its metrics."""
    outputs = _outputs(model, functions, batch)
    metrics = functions.metrics(outputs, to_device(batch, next(model.parameters()).device))
    check_metrics(metrics)
    return map_tensors(outputs, lambda tensor: tensor.cpu()), dict(metrics)


@torch.no_grad()
def _outputs(model: nn.Module, functions: Functions, batch: Any) -> Any:
    with eval_mode(model), preserve_buffers(model):
        moved = to_device(batch, next(model.parameters()).device)
        labels_for_loss(model, moved, functions.forward, functions.loss)
        return functions.forward(model, moved)


def _labels(
    given: tuple[Sequence[Any], Sequence[Any]] | None, outputs: Any, theirs: Any, *, classes: bool, own_head: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels of the model's and of the source model's outputs; equal if one head serves both."""
    if given is not None:
        return tuple(map(str, given[0])), tuple(map(str, given[1]))
    count = logits_of(outputs).shape[1] if classes else 1
    labels = tuple(map(str, range(count)))
    if not own_head:
        return labels, labels
    count = logits_of(theirs).shape[1] if classes and theirs is not None else 1
    return labels, tuple(f"source {number}" for number in range(count))


def _headline(training: Training | None, metrics: Mapping[str, Any]) -> Headline:
    """Return the metric that runs are judged by: the one to select on, else the accuracy, else the only one.

    Raises:
        SpecError: it is not measured, or there are several and none is named.
    """
    chosen = None if training is None else training.select
    if chosen is None:
        name = "accuracy" if "accuracy" in metrics else "loss" if not metrics else next(iter(metrics))
        if name not in KNOWN_DIRECTIONS or (len(metrics) > 1 and name != "accuracy"):
            raise SpecError(
                f"training.select: of the metrics, {', '.join(metrics)}, it must be known which one runs are judged "
                "by, and which values are better. Write "
                f"Training(select={{'metric': {name!r}, 'direction': 'higher'}}), or 'lower'."
            )
        chosen = Criterion.model_validate(name)
    check_metric(chosen, [*metrics, "loss"], "target")
    shown = metric_named(chosen.metric)
    return Headline(chosen.metric, chosen.direction, share=shown.share, text=shown.name)
