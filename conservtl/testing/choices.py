"""Lists of strategies that fit a model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from torch import nn

from conservtl import (
    L1SP,
    L2SP,
    LHUC,
    LPFT,
    AutoRGN,
    DiscriminativeLR,
    FeatureConservation,
    FeatureExtraction,
    FisherSP,
    GradualUnfreezing,
    GroupLassoSP,
    InputTransform,
    LayerTransfer,
    Mixout,
    NormAdaptation,
    OutputConservation,
    Projection,
    SelectiveDecay,
    SpectralShrinkage,
    Stage,
    Strategy,
    SurgicalFineTuning,
    WeightInterpolation,
)
from conservtl.errors import InputError
from conservtl.layers import find_layers
from conservtl.methods import apply_all, extend_all
from conservtl.plan.plan import Plan
from conservtl.plan.row import Anneal
from conservtl.testing.fields import instances

__all__ = ["strategies"]

_RATE = st.floats(1e-6, 0.4, allow_subnormal=False)
_SHARE = st.floats(0.1, 1.0)
_LENGTH = st.integers(1, 3) | st.floats(0.05, 0.3)
_TEMPERATURE = st.none() | st.floats(0.5, 4)


@st.composite
def strategies(
    draw: st.DrawFn, model: nn.Module, example: Any = None, *, max_size: int = 3, measured: bool = False
) -> list[Strategy]:
    """Lists of built-in strategies that agree with each other and leave the model something to train.

    The source is taken to have every parameter of the model. Strengths are such that an optimizer with a
    rate up to 0.1 can carry them out.

    Args:
        draw: hypothesis' own.
        model: the model they are for.
        example: its input, for the order of layers.
        max_size: the longest list.
        measured: whether some may need ``adaptation.measure(batches)`` before an optimizer can be made.
    """
    kept: list[Strategy] = []
    for one in draw(st.lists(_any(whole_plan(model, example)), min_size=1, max_size=max_size)):
        try:
            agreed = apply_all(whole_plan(model, example, [*kept, one]), [*kept, one])
            for decision in agreed.decisions:
                decision.check(model)
        except InputError:
            continue
        if agreed.trained and (measured or not (agreed.measures or agreed.searches)):
            kept.append(one)
    return kept


def whole_plan(model: nn.Module, example: Any = None, strategies: Sequence[Strategy] = ()) -> Plan:
    """The plan of a model whose source has everything but what these strategies add."""
    extending = [one for one in strategies if one.extends]
    model = copy.deepcopy(model) if extending else model
    added, _ = extend_all(model, extending, example)
    layers = find_layers(model, example)
    infos = [info for layer in layers for info in layer.parameters]
    return Plan.draw(layers, {info.name: info.shape for info in infos if info.name not in added}, added, (), added)


def _any(plan: Plan) -> st.SearchStrategy[Strategy]:
    globs = st.lists(st.sampled_from(plan.layers), min_size=1, max_size=3, unique=True).map(tuple)
    exact = st.dictionaries(st.sampled_from([row.name for row in plan.rows]), _RATE, min_size=1, max_size=3)
    count = st.integers(1, len(plan.layers))
    stage = instances(Stage, train=st.none() | globs, epochs=_LENGTH, scale=_SHARE)
    stages = st.lists(stage, min_size=1, max_size=3).map(tuple)
    full = st.none() | st.floats(0.4, 0.5)
    shapes: list[dict[str, st.SearchStrategy[Any]]] = [
        {"decay": _SHARE},
        {"lowest": _RATE},
        {"thirds": st.tuples(_RATE, _RATE, _RATE)},
        {"groups": exact},
        {"source": _RATE},
    ]
    rates = [
        instances(
            DiscriminativeLR,
            lr=full,
            fresh=st.none() | _RATE,
            **{name: shape.get(name, st.none()) for name in ("decay", "lowest", "thirds", "groups", "source")},
        )
        for shape in shapes
    ]
    pull = instances(
        L2SP,
        alpha=st.none() | st.floats(0, 2),
        beta=st.floats(0, 1),
        depth=st.none() | st.tuples(_SHARE, _SHARE),
        anneal=st.none() | instances(Anneal, start=_SHARE, end=_SHARE),
    )
    outputs = st.one_of(
        instances(OutputConservation, rho=st.none() | st.floats(0, 1), weight=st.none(), temperature=_TEMPERATURE),
        instances(OutputConservation, rho=st.none(), weight=st.floats(0, 2), temperature=_TEMPERATURE),
    )
    fisher = instances(
        FisherSP,
        alpha=st.none() | st.floats(0, 2),
        beta=st.floats(0, 1),
        draws=st.none() | st.integers(1, 3),
        floor=_SHARE,
        clip=st.none() | st.floats(1, 10),
    )
    tapped = {"alpha": st.none() | _SHARE, "layers": globs | st.integers(1, 3)}
    features = st.one_of(
        instances(FeatureConservation, metric=st.just("delta"), **tapped),
        instances(FeatureConservation, metric=st.just("ldifs"), attention=st.just(False), **tapped),
    )
    beta = {"beta": st.none() | st.just(0.01)}
    steps = [
        instances(AutoRGN, every=st.integers(1, 3)),
        instances(Projection, radius=_SHARE, steps=st.none(), rate=st.none()),
        instances(SelectiveDecay, strength=st.floats(0, 3)),
        instances(L1SP, alpha=_SHARE, **beta),
        instances(GroupLassoSP, alpha=_SHARE, **beta),
        instances(Mixout, p=st.floats(0, 0.9)),
    ]
    block = count.map(lambda n: n - 1) | st.sampled_from(("first", "last", *plan.layers))
    ends = instances(GradualUnfreezing, phases=st.none(), epochs=_LENGTH, scales=st.tuples(_SHARE, _SHARE))
    kinds: list[st.SearchStrategy[Any]] = [
        pull,
        st.one_of(rates),
        instances(LayerTransfer, layers=st.one_of(count, _SHARE, globs)),
        instances(FeatureExtraction, C=st.none(), layers=st.none() | globs),
        instances(InputTransform, dim=st.sampled_from((1, -1))),
        instances(LHUC, on=st.none() | globs),
        instances(NormAdaptation, prior=st.integers(0, 30)),
        fisher,
        features,
        *steps,
        instances(SurgicalFineTuning, block=block, candidates=st.none(), trial_epochs=st.none()),
        instances(SpectralShrinkage, eta=_SHARE, k=st.integers(1, 3), layer=st.none() | st.sampled_from(plan.layers)),
        instances(WeightInterpolation),
        outputs,
        instances(LPFT, epochs=_LENGTH, probe=_SHARE, fine_tuning=_SHARE),
        ends | stages.map(lambda phases: GradualUnfreezing(phases=phases)),
    ]
    return st.sampled_from(kinds).flatmap(lambda kind: kind)
