"""Low-rank adaptation: weights stay as in the source, and a product of two small factors is added to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from conservtl.bounds import Count, Positive, ProperShare
from conservtl.errors import PlanError, SpecError
from conservtl.layers import Layer, unwrap
from conservtl.layers.first_use import first_use
from conservtl.layers.names import owner
from conservtl.methods._rows import freeze_all_but, train_added
from conservtl.methods.base import Order, Span, Strategy, TestFields
from conservtl.methods.lora.factors import (
    FACTORS,
    add_factors,
    find_targets,
    has_factors,
    merge_factors,
    remove_factors,
)
from conservtl.plan.plan import Plan

__all__ = ["LoRA"]

_REASON = "factors of low rank, whose product starts at 0"


class LoRA(Strategy):
    r"""Train a change of low rank for each weight, and leave the weights themselves as they are.

    .. math:: W = W^0 + s\, B A, \qquad s = \alpha / r

    with A (r, inputs) and B (outputs, r), of linear maps and of convolutions; B = 0 at the start, so that the model's
    outputs do not change. The weights keep their names and values; A and B are the new parameters ``lora_A`` and
    ``lora_B`` beside them. Heads from the source stay as they are, fresh ones are trained. For other strategies A and B
    are parts of the weight: they take its layer's rate, and are frozen with its layer.

    ``merge`` (``adaptation.merged()``) adds the product to the weight, exact to rounding, so that the adapted model
    costs nothing more. ``L2SP`` beside it pulls the merged weights, alpha/2 of the squared norm of s B A, and
    ``WeightInterpolation`` and ``drift`` follow them too.

    Factors need a larger learning rate than weights. Adapters of other kinds, or one that PEFT has put on a model:
    ``conservtl.integrations.peft``.

    Cost: rank × (inputs + outputs) numbers for each weight to train, and to store for each speaker; two small products
    for each a step. No state of the optimizer for the weights.

    Hurts: where the target needs another function than a change of low rank gives, or the learning rate is that of
    weights.

    Reference:
        Hu et al. 2022, "LoRA: Low-rank adaptation of large language models", equation 3. Convolutions: as in PEFT, a
        convolution of r channels with the kernel of the weight's, and one of size 1.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)) for _ in range(2))
        >>> adaptation = ctl.adapt(model, source, [ctl.LoRA(rank=1)])
        >>> adaptation.plan.trained
        ('0.lora_A', '0.lora_B')
        >>> x = torch.randn(5, 4)
        >>> bool(torch.equal(model(x), source(x)))
        True
        >>> [name for name, _ in adaptation.merged().named_parameters()]
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """

    kind: Literal["lora"] = "lora"
    order: ClassVar[Order] = Order.HEAD
    merges_first: ClassVar[bool] = True
    test_fields: ClassVar[TestFields] = ({"rank": 1, "alpha": Span(0.5, 8), "dropout": 0.0, "on": None},)
    rank: Count = 8
    """r: rows of A."""
    alpha: Positive = 8.0
    """Numerator of the scale s = alpha / rank."""
    dropout: ProperShare = 0.0
    """Probability with which A reads 0 in the place of an input, in training."""
    on: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Globs of the layers or modules whose weights are changed. None: all linear maps and convolutions outside the
    head that have no fewer inputs and outputs than the rank and whose weight was not frozen when the model was handed
    in; with an ``example``, those that the model calls."""

    def apply(self, plan: Plan) -> Plan:
        """Freeze everything but the factors and other fresh parameters.

        Raises:
            PlanError: the model has no factors, or another strategy adds to their module or trains their weight.
        """
        pairs = [(row.low_rank.a, row.name) for row in plan.rows if row.added and row.low_rank is not None]
        if not pairs:
            raise PlanError(f"{self.label}: the plan's model has no factors. Let adapt(model, ...) add them.")
        for pair in pairs:
            self._check_alone(plan, owner(pair[0]), pair)
        idle = {name for pair in pairs for name in pair} - plan.factors.keys()  # all of a fresh weight is trained
        if not plan.factors:
            raise PlanError(
                f"{self.label} must change a weight from the source; those that it names are fresh, such as that of "
                f"{owner(pairs[0][0])!r}, and are trained themselves. Name others in on, or leave it out."
            )
        plan = train_added(plan, self.label, self.on, plan.factors)
        plan = freeze_all_but(plan, self.label, {*plan.fresh} - idle)
        if moving := [name for name in plan.factors.values() if not plan[name].frozen]:
            raise PlanError(
                f"{self.label} trains a change of {moving[0]!r}, but {plan[moving[0]].chosen['frozen'].by} trains the "
                "weight itself. Leave one of the two out there."
            )
        return plan

    def record(self, plan: Plan) -> Plan:
        """Record which weight each pair of factors changes."""
        changes = {}
        for module in (owner(row.name) for row in plan.rows if row.added and row.name.rpartition(".")[2] == FACTORS[1]):
            a, b, weight = (f"{module}.{name}".removeprefix(".") for name in (*FACTORS, "weight"))
            changes[b] = {"low_rank": {"a": a, "weight": weight, "scale": self.alpha / self.rank}}
        return plan.choose(self.label, "low_rank", changes)

    def _check_alone(self, plan: Plan, module: str, own: tuple[str, str]) -> None:
        """Raise if another strategy adds to a module too."""
        others = [row.name for row in plan.rows if row.added and owner(row.name) == module and row.name not in own]
        if others:
            raise PlanError(
                f"{self.label} and another strategy both add to {module!r} (there is {others[0]!r} too), and only one "
                "can. Give them other modules, by on."
            )

    def extend(self, model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, str]:
        """Add factors whose product is 0.

        Raises:
            SpecError: a module cannot be changed so, or is named and never called.
        """
        if hasattr(unwrap(model), "peft_config"):
            raise SpecError(
                f"{self.label}: the model must have no adapter yet; it has one of PEFT. Pass the model without it, or "
                "call conservtl.integrations.peft.adapt without this strategy."
            )
        if has_factors(model):
            raise SpecError(
                f"{self.label}: the model has factors already. Name one LoRA in strategies, and merge or retract those "
                "of an earlier adaptation first (LoRA().merge(model), LoRA().retract(model))."
            )
        names = find_targets(model, layers, self.on, self.rank)
        added = add_factors(model, names, self.rank, self.alpha / self.rank, self.dropout)
        if example is not None:
            used = first_use(unwrap(model), example)
            if idle := [name for name in added if name not in used]:
                self.retract(model)
                names = [name for name in names if not {f"{name}.{factor}" for factor in FACTORS} & {*idle}]
                if self.on is not None or not names:
                    raise SpecError(
                        f"{self.label}: {owner(idle[0])!r} must be called in a forward pass; the model reads its "
                        "weight otherwise, or not at all. Name others in on."
                    )
                added = add_factors(model, names, self.rank, self.alpha / self.rank, self.dropout)
        return dict.fromkeys(added, _REASON)

    def retract(self, model: nn.Module) -> None:
        """Remove the factors."""
        remove_factors(model)

    def merge(self, model: nn.Module) -> bool:
        """Add the products to the weights."""
        merge_factors(model)
        return True
