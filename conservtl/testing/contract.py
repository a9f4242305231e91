"""The contract of a strategy, which a user's own can be held to in one line."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.prepare import adapt
from conservtl.batches import map_tensors
from conservtl.compat import forward_hooks, forward_pre_hooks
from conservtl.errors import InputError
from conservtl.layers import find_layers, named_parameters
from conservtl.layers.copying import deep_copy
from conservtl.layers.extended import extended_modules, restore_module
from conservtl.methods import Strategy, apply_all
from conservtl.methods.discriminative_lr import DiscriminativeLR
from conservtl.methods.gradual_unfreezing import GradualUnfreezing
from conservtl.methods.l2_sp import L2SP
from conservtl.methods.layer_transfer import LayerTransfer
from conservtl.plan.plan import Plan
from conservtl.source.read import SourceLike
from conservtl.testing.laws import LAWS, LawCase, check_law
from conservtl.testing.steps import backward, doubled, held, measured, objective, outputs_of
from conservtl.testing.weights import random_weights

__all__ = ["check_strategy"]

_KEPT = ("name", "layer", "depth", "shape", "kind", "source_shape")
_COMPANIONS: tuple[Strategy, ...] = (
    LayerTransfer(layers=1),
    L2SP(alpha=0.1),
    DiscriminativeLR(decay=0.5),
    GradualUnfreezing(),
)
_RATE = 1e-3


@dataclass(frozen=True)
class _Case:
    model: nn.Module
    source: SourceLike
    example: Any
    ordered: bool = False
    """Whether the order of registration is that of use, so that the example need not show it."""

    def adapted(self, strategies: Sequence[Strategy]) -> Adaptation:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            shown = not self.ordered or any(one.extends for one in strategies)
            example = self.example if shown else None
            return adapt(deep_copy(self.model), self.source, strategies, example=example)

    def drawn(self, strategy: Strategy) -> Plan:
        """The plan before any strategy, with what this one adds to the model."""
        return self.adapted([strategy] if strategy.extends else []).origin.drawn


def check_strategy(
    strategy: Strategy, *, model: nn.Module | None = None, source: SourceLike | None = None, example: Any = None
) -> None:
    """Hold a strategy to the contract that every strategy keeps.

    It is a frozen spec (no unknown fields, a ``kind``, a description under every field, the same after
    JSON); ``apply`` is a pure function of the plan, keeps its rows, and does not depend on the strategy's
    place in the list; a model adapted by it trains, what is frozen stays bit for bit, what is trained is in
    one group each, no step that a scaler skips moves anything, and no model is affected by another.

    Args:
        strategy: the one to check.
        model: what to apply it to; it is copied. None: a small convolutional network of nine layers, once
            with a head that the source does not fit and once with one that it does.
        source: None: random weights for all of the model.
        example: an input, needed to try batch norms of a model of your own.

    Raises:
        AssertionError: the contract is broken; the message says where.
        InputError: the strategy cannot be applied to the model, whichever; pass one that it fits.

    Example:
        >>> from conservtl import DiscriminativeLR
        >>> check_strategy(DiscriminativeLR(decay=0.8))
    """
    _check_spec(strategy)
    refusals = []
    lawful = False  # the laws of a step take long, and one model shows them
    cases = list(_cases(model, source, example))
    for case in cases:
        try:
            plan = case.drawn(strategy)
            before = plan.model_dump_json()
            strategy.apply(plan)
        except InputError as error:
            refusals.append(error)
            continue
        rule = "apply changed the plan it was given; return a new one."
        _require(plan.model_dump_json() == before, strategy, rule)
        if strategy.extends:
            _check_extension(strategy, case)
        _check_pure(strategy, plan)
        _check_place(strategy, plan)
        _check_memory(strategy, plan)
        _check_extended_modules(strategy, case)
        _check_training(strategy, case)
        _check_skipped(strategy, case)
        if not lawful and (tried := _law_case(strategy, case)) is not None:
            lawful = True
            for law in LAWS:
                check_law(law, tried)
    if len(refusals) == len(cases):
        raise refusals[0]


def _cases(model: nn.Module | None, source: SourceLike | None, example: Any) -> Iterator[_Case]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if model is not None:
            yield _Case(model, random_weights(model, 1) if source is None else source, example)
            return
        weights = random_weights(_network(3), 1)
        for classes in (2, 3):
            yield _Case(_network(classes), weights if source is None else source, torch.randn(4, 2, 5, 5), ordered=True)


def _network(classes: int) -> nn.Module:
    parts: list[nn.Module] = []
    for channels in (2, 3, 3):
        parts += [nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()]
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(5):
        parts += [nn.Linear(3, 3), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(3, classes))


def _require(holds: bool, strategy: Strategy, rule: str) -> None:
    if not holds:
        raise AssertionError(f"{strategy.label}: {rule}")


def _refused(action: Callable[[], object]) -> bool:
    try:
        action()
    except ValidationError:
        return True
    except (AttributeError, TypeError):
        return True
    return False


def _check_spec(strategy: Strategy) -> None:
    cls = type(strategy)
    fields = strategy.model_dump()
    _require(bool(fields.get("kind")), strategy, "has no kind; give it kind: Literal['...'] = '...'.")
    kind = cls.model_fields["kind"]
    constant = get_args(kind.annotation) == (kind.default,) == (fields["kind"],)
    rule = "kind must be a constant, Literal['...'] = '...', so that specs can name it."
    _require(constant, strategy, rule)
    _require(_refused(lambda: setattr(strategy, "kind", fields["kind"])), strategy, "is not frozen; keep frozen=True.")
    extra = {**fields, "no_such_field": 1}
    _require(_refused(lambda: cls(**extra)), strategy, "takes fields that it does not have; keep extra='forbid'.")
    try:
        again: Strategy | str = cls.model_validate_json(strategy.model_dump_json())
    except ValidationError as error:
        again = str(error)
    _require(again == strategy, strategy, f"is another after JSON: {again}")
    _require(copy.deepcopy(strategy) == strategy, strategy, "a deep copy of it differs.")
    schema = cls.model_json_schema()
    for place, definition in {cls.__name__: schema, **schema.get("$defs", {})}.items():
        for name, field in definition.get("properties", {}).items():
            described = name == "kind" or "description" in field
            _require(described, strategy, f"{place}.{name} has no description; write a docstring under the field.")


def _check_pure(strategy: Strategy, plan: Plan) -> None:
    state = torch.get_rng_state()
    result = strategy.apply(plan)
    _require(isinstance(result, Plan), strategy, f"apply must return a Plan; it returned {type(result).__name__}.")
    _require(torch.equal(state, torch.get_rng_state()), strategy, "apply drew random numbers; a plan has none.")
    _require(strategy.apply(plan) == result, strategy, "apply gives another plan the second time.")
    _require(len(result.rows) == len(plan.rows), strategy, "apply added or dropped rows.")
    for old, new in zip(plan.rows, result.rows, strict=True):
        for field in _KEPT:
            rule = f"apply changed {field} of row {old.name!r}, which describes the model and is no decision."
            _require(getattr(old, field) == getattr(new, field), strategy, rule)
    again = Plan(**result.model_dump(mode="json"))
    _require(again == result, strategy, "its plan is another after JSON.")


def _check_extension(strategy: Strategy, case: _Case) -> None:
    model = deep_copy(case.model).eval()
    before, outputs = _described(model), outputs_of(model, case.example)
    added = strategy.extend(model, find_layers(model, case.example), case.example)
    names = list(named_parameters(model))
    _require(set(added) == set(names) - before[0].keys(), strategy, "extend must return what it added.")
    _require(_described(model)[1:] != before[1:], strategy, "extend changed nothing, but the strategy says it does.")
    rule = "extend added no parameters; if it replaces the head, declare that: replaces_head = True."
    _require(bool(added) or strategy.replaces_head, strategy, rule)
    new = [*added, *(_head(model, case.example) if strategy.replaces_head else ())]
    same = strategy.replaces_head or _same(outputs, outputs_of(model, case.example))
    _require(same, strategy, "extend changed what the model computes.")
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301 - made here
    for one in (model, deep_copy(model), twin):
        _disturb(one, new)
        changed = outputs_of(one, case.example)
        acts = not case.ordered or not _same(outputs, changed)  # in a model of the caller's, units may be dead
        _require(acts, strategy, "what it added has no effect on what the model computes.")
        merged = deep_copy(one)
        emptied = strategy.merge(merged)
        _require(_same(changed, outputs_of(merged, case.example)), strategy, "merge changed what the model computes.")
        left = _described(merged)[1:] != before[1:]
        _require(emptied is not left, strategy, f"merge says {emptied}, but something is {'' if left else 'not '}left.")
        strategy.retract(one)
        after = _described(one)
        _require(after[1:] == before[1:] and list(after[0]) == list(before[0]), strategy, "retract leaves something.")
        held = all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
        _require(held, strategy, "extend or retract changed the model's own parameters.")


def _check_extended_modules(strategy: Strategy, case: _Case) -> None:
    """Hold the extensions of a plan to copies, to pickles, to the model's state dict, and to their end."""
    adaptation = case.adapted([strategy])
    if not adaptation.plan.extensions:
        return
    model, plain = adaptation.model.eval(), deep_copy(case.model)
    names = model.state_dict().keys() - {row.name for row in adaptation.plan.rows if row.added}
    _require(names == plain.state_dict().keys(), strategy, "an extended module changed the names in the state dict.")
    extended = extended_modules(model)
    _require(bool(extended), strategy, "its extension extends no module of the model.")
    outputs = outputs_of(model, case.example)
    for twin in (deep_copy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - made here
        rule = "a copy of the model computes otherwise; keep the settings of an extended module in its settings."
        _require(_same(outputs, outputs_of(twin, case.example)), strategy, rule)
    for module in extended.values():
        restore_module(module)
    left = not strategy.extends and _described(model)[1:] != _described(plain)[1:]
    _require(not left, strategy, "something is left of its extension; change nothing but the class of a module.")
    acts = not case.ordered or not _same(outputs, outputs_of(model, case.example))
    _require(acts, strategy, "its extension has no effect on what the model computes.")


def _head(model: nn.Module, example: Any) -> tuple[str, ...]:
    return Plan.draw(find_layers(model, example), {}, {}).head


def _described(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[str, type]], list[int]]:
    """Parameters and buffers, modules in their order, and how many hooks each has."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(forward_hooks(m)) + len(forward_pre_hooks(m)) for m in model.modules()]
    return tensors, [(name, type(module)) for name, module in model.named_modules()], hooks


@torch.no_grad()
def _disturb(model: nn.Module, names: Iterable[str]) -> None:
    generator = torch.Generator().manual_seed(1)
    parameters = named_parameters(model)
    for name in names:
        noise = torch.randn(parameters[name].shape, generator=generator)
        parameters[name].add_(noise.to(parameters[name]) / max(1, len(noise)) ** 0.5)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))


def _check_place(strategy: Strategy, plan: Plan) -> None:
    for other in _COMPANIONS:
        first, last = _outcome(plan, [strategy, other]), _outcome(plan, [other, strategy])
        rule = f"gives another plan before {other.label} than after it; declare in order what it reads."
        _require(first == last, strategy, rule)


def _outcome(plan: Plan, strategies: Sequence[Strategy]) -> Plan | str:
    try:
        return apply_all(plan, strategies)
    except InputError:
        return "refused"


def _check_memory(strategy: Strategy, plan: Plan) -> None:
    result = strategy.apply(plan)
    layers = find_layers(nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))))
    other = Plan.draw(layers, {info.name: info.shape for layer in layers for info in layer.parameters}, {})
    _outcome(other, [strategy])
    _require(strategy.apply(plan) == result, strategy, "remembers the plans it was applied to before.")


def _check_training(strategy: Strategy, case: _Case) -> None:
    first, second = case.adapted([strategy]), case.adapted([strategy])
    start = {name: tensor.clone() for name, tensor in second.model.state_dict().items()}
    if not first.plan.trained or not measured(first, case.example):
        return
    copied = copy.deepcopy(first)
    _train(strategy, first, case.example)
    held = all(torch.equal(start[name], tensor) for name, tensor in second.model.state_dict().items())
    _require(held, strategy, "training one model changed another.")
    _train(strategy, copied, case.example)
    theirs = named_parameters(copied.model)
    same = all(torch.equal(p, theirs[name]) for name, p in named_parameters(first.model).items())
    _require(same, strategy, "a deep copy of the adaptation trains otherwise than it.")
    _require(case.adapted([strategy]).plan == second.plan, strategy, "plans otherwise after a model has been trained.")


def _check_skipped(strategy: Strategy, case: _Case) -> None:
    """What a fused optimizer does where its scaler found a gradient that is not finite: nothing."""
    adaptation = case.adapted([strategy])
    parameters = named_parameters(adaptation.model)
    if not all(parameter.is_floating_point() for parameter in parameters.values()):
        return
    if not adaptation.plan.trained or not measured(adaptation, case.example):
        return
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=_RATE, fused=True)
    backward(adaptation, case.example, 0)
    optimizer.found_inf = torch.ones((), device=next(iter(parameters.values())).device)  # type: ignore[attr-defined]
    optimizer.step()
    moved = [name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])]
    _require(not moved, strategy, f"{moved[:1]} moved in a step that was skipped; heed step.skip.")


def _law_case(strategy: Strategy, case: _Case) -> LawCase | None:
    """Return what the laws of a step are tried on; None if nothing is trained, or a search comes first.

    Weights have moved away from the source, and numbers are in double precision if the model takes them.
    """
    model = deep_copy(case.model).double()
    example = map_tensors(case.example, lambda t: t.double() if t.is_floating_point() else t)
    try:
        outputs_of(deep_copy(model).eval(), example)
    except RuntimeError:
        model, example = case.model, case.example
    precise = replace(case, model=model, example=example)
    ready = precise.adapted([strategy])
    trained = [one for one in named_parameters(ready.model).values() if one.requires_grad]
    if not all(one.is_floating_point() for one in named_parameters(ready.model).values()):
        return None
    if not trained or not measured(ready, example):
        return None
    ready.start_phase(len(ready.plan.phases) - 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in named_parameters(ready.model).items():
            if name not in ready.frozen:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    means = all(type(term).mean_over_batch for term in ready.plan.terms)
    return LawCase(
        label=strategy.label,
        make=lambda: deep_copy(ready),
        rebuild=lambda: precise.adapted([strategy]),
        objective=objective,
        batch=example,
        parts=(example, example),
        doubled=doubled(deep_copy(model).eval(), example) if means and example is not None else None,
        options={"lr": _RATE, "momentum": 0.9},
        steps=2,
    )


def _train(strategy: Strategy, adaptation: Adaptation, example: Any) -> None:
    """Two steps in every phase, with the laws of each checked."""
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=_RATE, momentum=0.9)
    listed = [name for group in optimizer.param_groups for name in group["param_names"]]
    rule = "the optimizer's groups must hold each parameter trained in some phase once."
    _require(sorted(listed) == sorted(adaptation.plan.trained), strategy, rule)
    for phase in range(len(adaptation.plan.phases)):
        adaptation.start_phase(phase)
        adaptation.model.train()
        before = {name: tensor.clone() for name, tensor in held(adaptation).items()}
        for step in range(2):
            optimizer.zero_grad()
            backward(adaptation, example, step)
            optimizer.step()
        for name, tensor in held(adaptation).items():
            _require(torch.equal(tensor, before[name]), strategy, f"{name!r} is frozen in phase {phase + 1} and moved.")
