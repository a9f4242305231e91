"""Comparisons and sweeps of a model and data that a program holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Unpack

from conservtl.engine import Training
from conservtl.engine.randomness import preserve_rng
from conservtl.errors import DataError, SpecError
from conservtl.experiments.own.maker import blank
from conservtl.experiments.own.options import ModelLike, ProblemOptions
from conservtl.experiments.own.place import Place
from conservtl.experiments.own.problem import OwnProblem, hold, settings_of
from conservtl.experiments.own.settings import Variant, fields_of, section_of
from conservtl.experiments.results import Comparison, Sweep
from conservtl.experiments.spec.sections import BASELINES, Baseline, CompareSection, SweepSection
from conservtl.experiments.studies import comparison, layer_sweep
from conservtl.experiments.studies.executors.names import PROCESSES
from conservtl.experiments.studies.variants import left_out
from conservtl.methods import Strategy, as_strategy
from conservtl.source.itself import Itself
from conservtl.source.read import SourceLike

__all__ = ["compare", "sweep"]


def compare(
    model: ModelLike,
    source: SourceLike | Itself,
    variants: Mapping[str, Variant],
    train: Any,
    held_out: Mapping[str, Any],
    training: Training | None = None,
    *,
    seeds: int = 5,
    seed: int = 0,
    baselines: Sequence[Baseline] = BASELINES,
    rates: tuple[float, float, float] = (1e-4, 3e-4, 1e-3),
    probe_rate: float = 1e-2,
    scratch_rate: float = 1e-3,
    out: str | Path | None = None,
    processes: int = 1,
    executor: str | Executor = PROCESSES,
    progress: bool = False,
    **options: Unpack[ProblemOptions],
) -> Comparison:
    """Compare lists of strategies with baselines on your own model and data, over seeds and targets.

    It is the study of ``conservtl compare``: the same baselines (the source as it is, training from scratch, a linear
    probe, plain fine-tuning at three rates, interpolated with the source, and joint training if there are source
    data), the same splits for all variants, and differences from the best baseline that are paired by target and seed,
    with bootstrap intervals. Held-out sets are scored; nothing is selected on them. A seed draws the shots, the
    validation part, fresh parameters and the order of batches. Model, source and random generators stay as they are.

    Args:
        model: a model, which is copied for each run; or a function that returns a new one with random values, so that
            seeds differ in fresh parameters too.
        source: as for ``adapt``.
        variants: name -> strategies, or a recipe, whose training settings are then those of the variant.
        train: labelled target examples: ``Examples``, a tuple (inputs, labels), a dictionary of tensors or a map-style
            dataset; or target -> examples, such as one set for each speaker.
        held_out: {"target": examples, "source": examples}; examples of the target by target, if there are several.
            Without "source" the source's score is left out.
        training: settings of ``fit`` for all variants; None: the defaults.
        seeds: runs of each variant and target.
        seed: the first seed.
        baselines: those to run.
        rates: low, middle and high rate of plain fine-tuning, which stops early on a part of ``train``.
        probe_rate: rate of the linear probe.
        scratch_rate: rate of training from scratch.
        out: folder for results, which are stored run by run; the same call, in another process too, continues an
            interrupted one there. It counts as the same if models, source and data have the same values and functions
            the same code, and do the same on the first examples; other calls can share the folder. None: none are kept.
        processes: number of processes of this machine.
        executor: where runs are executed, as for ``conservtl compare``: ``"processes"``, ``"dask:ADDRESS"``,
            ``"submitit:FOLDER"``, or a ``concurrent.futures`` executor, which stays open. Workers of an executor see
            the folder ``out``.
        progress: whether to write the number of finished runs to stderr.
        options: further arguments, as for ``adapt`` and ``fit``: ``valid``, ``source_data``, ``shots``, ``labels``,
            ``fresh``, ``allow``, ``layers``, ``head``, ``example``, ``key``, ``prefix``, ``rename``, ``forward``,
            ``loss``, ``metrics``, ``augment``, ``proxies``, ``optimizer``. ``valid`` are examples to select on, or the
            part of ``train`` to select on; ``source_data`` source examples to train with; ``shots`` the number of
            examples of each class, drawn by the seed.

    Returns:
        Tables, figures and a verdict; ``best`` is the name of the best variant.

    Raises:
        InputError: one of its kinds, before the first run; the message says what to change.

    Example:
        >>> import torch, conservtl as ctl
        >>> data = torch.randn(24, 4), torch.arange(24) % 2
        >>> found = ctl.compare(
        ...     lambda: torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), {"L2-SP": [ctl.L2SP(alpha=0.1)]}, data,
        ...     {"target": data, "source": data}, ctl.Training(epochs=1), seeds=1,
        ...     baselines=["source as it is", "fine-tuning, low rate"],
        ... )
        >>> found.best
        'L2-SP'
    """
    section = section_of(
        CompareSection,
        {
            "seeds": seeds,
            "variants": fields_of(variants),
            "baselines": baselines,
            "rates": rates,
            "probe_rate": probe_rate,
            "scratch_rate": scratch_rate,
        },
    )
    _check_held_out(held_out)
    place = Place(out, processes, executor, progress=progress)
    with preserve_rng():
        problem = hold(model, source, train, held_out, training, options)
        spec = settings_of(problem, training, seed=seed, stored=place.stores, options=options)
        absent = left_out(spec, section) if section.baselines == BASELINES else {}
        if "from scratch" in section.baselines and (reason := _no_scratch(problem)):
            absent["from scratch"] = reason
        rest = tuple(name for name in section.baselines if name not in absent)
        section = section.model_copy(update={"baselines": rest})
        spec = spec.model_copy(update={"compare": section})
        result = comparison.summarise(spec, place.results(comparison.plan_trials(spec)))
    left = [f"{name}: {reason.rstrip('.')}" for name, reason in absent.items()]
    result |= {"left_out": [*result["left_out"], *left], "variants": comparison.trained_as(spec)}
    return Comparison(place.kept(_shown(result), "compare"))


def sweep(
    model: ModelLike,
    source: SourceLike | Itself,
    train: Any,
    held_out: Mapping[str, Any],
    training: Training | None = None,
    *,
    strategy: Strategy | Mapping[str, Any] | None = None,
    strengths: Sequence[float] | None = None,
    numbers: Sequence[int] | None = None,
    sides: Sequence[str] = ("input", "output"),
    controls: bool = True,
    seeds: int = 3,
    seed: int = 0,
    out: str | Path | None = None,
    processes: int = 1,
    executor: str | Executor = PROCESSES,
    progress: bool = False,
    **options: Unpack[ProblemOptions],
) -> Sweep:
    """Measure how many layers transfer, and which strength of conservation is best, on your own model and data.

    It is the study of ``conservtl sweep``: n layers from either side start from the source, held or fine-tuned, and
    the others at random values; then a conservation method over strengths, and the path between source and fine-tuned
    weights.

    Args:
        model: a model, which is copied for each run; its layers then begin at random values by their
            ``reset_parameters``. Or a function that returns a new one with random values.
        source: as for ``adapt``.
        train: as for ``compare``.
        held_out: as for ``compare``.
        training: settings of ``fit``; None: the defaults.
        strategy: the method whose strength is swept; None: decoupled L2-SP.
        strengths: its strengths; None: six decades around the strategy's.
        numbers: numbers of layers transferred; None: from none to all but the head.
        sides: sides to count the layers from.
        controls: whether to train networks that transfer from themselves too.
        seeds: runs of each point and target.
        seed: the first seed.
        out: as for ``compare``.
        processes: as for ``compare``.
        executor: as for ``compare``.
        progress: whether to write the number of finished runs to stderr.
        options: further arguments, as for ``compare``.

    Returns:
        Tables, figures and sentences; ``best`` is the best strength.

    Raises:
        InputError: one of its kinds, before the first run; the message says what to change.

    Reference:
        Yosinski, Clune, Bengio and Lipson 2014, "How transferable are features in deep neural networks?", section 3.
    """
    section = section_of(
        SweepSection,
        {
            "seeds": seeds,
            "layers": numbers,
            "sides": sides,
            "controls": controls,
            "strategy": None if strategy is None else as_strategy(strategy).model_dump(mode="json"),
            "strengths": strengths,
        },
    )
    _check_held_out(held_out)
    place = Place(out, processes, executor, progress=progress)
    with preserve_rng():
        problem = hold(model, source, train, held_out, training, options)
        spec = settings_of(problem, training, seed=seed, stored=place.stores, options=options)
        if problem.filled:
            blank(problem.task.make())  # refused before the first run
        own = spec.model.model_copy(update={"random": problem.filled})
        spec = spec.model_copy(update={"model": own, "sweep": section})
        layers = layer_sweep.transferable_layers(spec)
        planned = layer_sweep.plan_trials(spec, layers)
        runs = place.results([trial for trial, _ in planned])
        result = layer_sweep.summarise(spec, layers, [point for _, point in planned], runs)
    return Sweep(place.kept(_shown(result), "sweep"))


def _check_held_out(held_out: Any) -> None:
    if not isinstance(held_out, Mapping) or held_out.get("target") is None:
        raise DataError(
            "held_out must have 'target', examples of the target that no run trains on; received "
            f"{sorted(held_out) if isinstance(held_out, Mapping) else type(held_out).__name__}. Hold some out."
        )


def _no_scratch(problem: OwnProblem) -> str:
    """Return why no model can be trained from scratch; empty if one can."""
    if not problem.filled:
        return ""
    try:
        blank(problem.task.make())
    except SpecError as error:
        return str(error)
    return ""


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result whose settings are those that a reader knows."""
    own = {"task", "model", "source", "fresh", "compare", "sweep", "tune"}
    return result | {"spec": {name: value for name, value in result["spec"].items() if name not in own}}
