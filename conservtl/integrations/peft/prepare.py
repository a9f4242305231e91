"""``adapt`` for a model with an adapter of PEFT: the source is the same model with its adapter off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.prepare import adapt as plain_adapt
from conservtl.errors import SpecError
from conservtl.integrations.peft.checks import check_biases, check_plan
from conservtl.integrations.peft.factors import AdapterFactors
from conservtl.integrations.peft.lora import Pair, change, lora_pairs
from conservtl.integrations.peft.names import BASE_LAYER, LORA_ATTENTION, PEFT_MODEL, SAVED_MODULES
from conservtl.layers import canonical, unwrap
from conservtl.methods import Strategy, as_strategies
from conservtl.methods.l2_sp import L2SP
from conservtl.plan.row import LowRank
from conservtl.source.read import Source
from conservtl.source.shared import SharedModel

__all__ = ["AdapterAdaptation", "adapt"]


def adapt(
    model: nn.Module,
    strategies: Sequence[Strategy | Mapping[str, Any]] = (),
    *,
    example: Any = None,
    layers: Sequence[str] | None = None,
    fresh: str | Sequence[str] | Mapping[str, str] = (),
    head: Sequence[str] | None = None,
) -> AdapterAdaptation:
    """Draw up the plan of a model with an adapter; the source is the model with its adapter off.

    The base keeps ``requires_grad`` as ``get_peft_model`` left it, and its weights are neither copied nor kept twice:
    terms that compare with the source run the model itself without its adapter (``disable_adapter``).

    - Factors of a LoRA count as parts of the weights that they change, as those of ``ctl.LoRA`` do: they take the rates
      of their layers and of the source, and are frozen and unfrozen with them. Parameters of other adapters are fresh.
    - ``L2SP`` pulls the weights that a LoRA changes: alpha/2 of the squared norm of scale × B A, which is its penalty
      on the merged weights. beta acts on other fresh parameters (``modules_to_save``).
    - ``WeightInterpolation`` scales each change, by scaling B: position t on the way from the base to the adapted
      model. ``drift`` measures the change of the merged weights.
    - Rates, phases, terms on features and outputs act as on any model.

    Wrap first, adapt second: a model that ``get_peft_model`` wraps after ``adapt`` is refused when the optimizer is
    made.

    Args:
        model: a PeftModel with its adapter on.
        strategies: as for ``conservtl.adapt``.
        example: as for ``conservtl.adapt``.
        layers: as for ``conservtl.adapt``.
        fresh: as for ``conservtl.adapt``; parameters of adapters and ``modules_to_save`` need not be named.
        head: as for ``conservtl.adapt``.

    Raises:
        MissingExtraError: on import of this module, if PEFT is not installed; or its version has other names.
        InputError: one of its kinds: the model has no adapter, the adapter is no plain LoRA (DoRA, several adapters,
            initialisations that move base weights) under ``L2SP`` or work after training, or a strategy acts on
            weights of the base, which are frozen.

    Example:
        >>> import peft, torch
        >>> from conservtl import L2SP
        >>> from conservtl.integrations.peft import adapt
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
        >>> adaptation = adapt(model, [L2SP(alpha=0.1)])
        >>> adaptation.plan.trained
        ('base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.weight')
        >>> adaptation.drift()["base_model.model.0"]
        0.0
    """
    bare = unwrap(model)
    if not isinstance(bare, PEFT_MODEL):
        raise SpecError(
            f"model must have an adapter: a PeftModel as get_peft_model returns it; received a {type(bare).__name__}. "
            "Wrap it first, or call conservtl.adapt."
        )
    for name, module in bare.named_modules():
        if isinstance(module, LORA_ATTENTION):
            raise SpecError(
                f"{name!r}: LoRA on torch's MultiheadAttention makes its weights anew whenever they are listed, so no "
                "optimizer can be sure of them. Target other modules, or a model with linear maps for its attention."
            )
    chosen = [*as_strategies(strategies)]
    pairs: tuple[Pair, ...] | None = None
    reason: SpecError | None = None
    try:
        pairs = lora_pairs(bare)
    except SpecError as error:
        if any(isinstance(strategy, L2SP) for strategy in chosen):
            raise
        reason = error
    added = _of_adapters(bare)
    state = {canonical(name): tensor for name, tensor in bare.state_dict().items()}
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith(added)}
    source = Source(tensors, "the model without its adapter", shared=AdapterOff(bare))
    if pairs is not None:
        check_biases(pairs, chosen)
        changes = {one.b: LowRank(a=one.a, weight=one.weight, scale=one.scale, bias=one.bias) for one in pairs}
        chosen.append(AdapterFactors(changes=changes))
    adaptation = plain_adapt(model, source, chosen, example=example, layers=layers, fresh=fresh, head=head)
    try:
        check_plan(adaptation, pairs, reason)
    except BaseException:
        adaptation.bound.terms.detach()
        raise
    return AdapterAdaptation.of(adaptation, pairs or ())


class AdapterAdaptation(Adaptation):
    """An adaptation of a model with an adapter; ``adapt`` of this package makes it.

    Its starting point is the base: ``start`` holds zeros for each B of a LoRA, so that what acts after training moves
    along the merged weights.
    """

    pairs: tuple[Pair, ...] = ()

    @classmethod
    def of(cls, adaptation: Adaptation, pairs: tuple[Pair, ...]) -> AdapterAdaptation:
        """Return the adaptation with the pairs of its LoRA."""
        new = object.__new__(cls)
        new.__dict__.update(adaptation.__dict__, pairs=pairs)
        return new

    @property
    def start(self) -> dict[str, Tensor]:
        """Starting point on the CPU of what training changes: zero for each B, and what is trained of the base."""
        parameters = self.bound.parameters()
        names = [name for pair in self.pairs for name in (pair.b, pair.bias) if name is not None]
        zeros = {name: torch.zeros(parameters[name].shape, dtype=parameters[name].dtype) for name in names}
        return {**self.bound.anchors.parameters, **zeros}

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """Return layer -> |w - w0| / |w0| over its parameters from the source, with the adapter merged."""
        self.restore_weights()
        parameters, anchors = self.bound.parameters(), self.bound.anchors.parameters
        squares = {name: _square(parameters[name].cpu().double() - anchors[name].double()) for name in anchors}
        for pair in self.pairs:
            squares[pair.weight] = change(parameters[pair.a], parameters[pair.b], pair.scale) ** 2
            if pair.bias is not None and pair.weight.removesuffix("weight") + "bias" not in anchors:
                squares[pair.weight] += _square(pair.scale * parameters[pair.bias].double())
        drift = {}
        for layer, rows in self.plan.by_layer():
            names = [row.name for row in rows if row.origin == "source"]
            if names:
                moved = sum(squares.get(name, 0.0) for name in names)
                size = sum(_square(anchors.get(name, parameters[name]).double()) for name in names)
                drift[layer] = (moved / size) ** 0.5 if size else float(moved > 0)
        return drift


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())


class AdapterOff(SharedModel):
    """A PeftModel, which computes the source's function while its adapter is off."""

    model: Any

    @contextmanager
    def as_source(self) -> Iterator[None]:
        """Turn the adapter off; PEFT sets ``requires_grad`` when it turns it on, so it is restored."""
        asked = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in asked:
                parameter.requires_grad_(requires_grad)


def _of_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of parameters begin with that an adapter has added to a model."""
    prefixes = ["prompt_encoder."]
    for name, module in model.named_modules():
        where = f"{canonical(name)}." if name else ""
        if isinstance(module, BASE_LAYER):
            prefixes += [f"{where}{key}." for key in module.adapter_layer_names]
        if isinstance(module, SAVED_MODULES):
            prefixes.append(f"{where}modules_to_save.")
    return tuple(prefixes)
