"""Learning hidden unit contributions: one amplitude for each hidden unit, trained on the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from conservtl.errors import PlanError
from conservtl.layers import Layer
from conservtl.methods._rows import freeze_all_but, train_added
from conservtl.methods.base import Order, Strategy
from conservtl.methods.lhuc.amplitudes import (
    PARAMETER,
    add_amplitudes,
    merge_amplitudes,
    plain_amplitudes,
    remove_amplitudes,
)
from conservtl.methods.lhuc.hidden_units import find_hidden_units
from conservtl.plan.plan import Plan

__all__ = ["LHUC"]

_REASON = "amplitudes of hidden units, which start at 1"


class LHUC(Strategy):
    r"""Scale each hidden unit by its own amplitude between 0 and 2, learned from the target.

    .. math:: h' = 2\,\sigma(r) \circ h

    with r = 0 at the start, so that the model's outputs do not change. Its parameters keep their names; r is the new
    parameter ``lhuc`` beside them. Weight decay on r pulls to amplitude 1: that of
    ``L2SP(beta=..., on="all")``, or the optimizer's with ``DiscriminativeLR(decay_biases_and_norms=True)``.

    The output of a linear map or convolution is scaled, or that of the norm behind it. Before a ReLU that equals
    scaling the ReLU's output, because amplitudes are positive; before other activations it is the variant that scales
    their input. Of a recurrent layer the outputs of all steps are scaled (of the last level, if there are several),
    its state is not. ``merge`` (``adaptation.merged()``) multiplies the amplitudes into weights and biases, exact to
    rounding, so that the adapted model costs nothing more; those of recurrent layers stay.

    Amplitudes need a larger learning rate than weights.

    Measured: docs/methods.md.

    Cost: one number for each unit to train, and to store for each speaker; one product for each layer a step.

    Hurts: where the target differs by more than the strength of units, or the learning rate is that of weights.

    Reference:
        Swietojanski and Renals 2014, "Learning hidden unit contributions for unsupervised speaker adaptation of neural
        network acoustic models", section 2. Swietojanski, Li and Renals 2016, "Learning hidden unit contributions for
        unsupervised acoustic model adaptation", section III.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)) for _ in range(2))
        >>> adaptation = ctl.adapt(model, source, [ctl.LHUC()])
        >>> adaptation.plan.trained
        ('0.lhuc',)
        >>> x = torch.randn(5, 4)
        >>> bool(torch.equal(model(x), source(x)))
        True
        >>> [name for name, _ in adaptation.merged().named_parameters()]
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """

    kind: Literal["lhuc"] = "lhuc"
    order: ClassVar[Order] = Order.HEAD
    on: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Globs of the layers or modules whose units are scaled. None: all layers but the last,
    and of several parallel heads all but these; without modules that were frozen when the model was handed in."""
    freeze: bool = True
    """Whether everything is frozen except the amplitudes and other fresh parameters."""

    def apply(self, plan: Plan) -> Plan:
        """Choose the parameters that are frozen."""
        own = [row.name for row in plan.rows if row.added and row.name.rpartition(".")[2] == PARAMETER]
        if not own:
            raise PlanError(f"{self.label}: the plan's model has no amplitudes. Let adapt(model, ...) add them.")
        plan = train_added(plan, self.label, self.on, own)
        return freeze_all_but(plan, self.label, plan.fresh) if self.freeze else plan

    def extend(self, model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, str]:
        """Add amplitudes of 1 to the hidden units."""
        return dict.fromkeys(add_amplitudes(model, find_hidden_units(model, layers, self.on, example)), _REASON)

    def retract(self, model: nn.Module) -> None:
        """Remove the amplitudes."""
        remove_amplitudes(model)

    def merge(self, model: nn.Module) -> bool:
        """Multiply the amplitudes into the weights they scale."""
        return merge_amplitudes(model)

    def plain(self, model: nn.Module) -> nn.Module:
        """Scale outputs by modules of torch alone, where amplitudes are left."""
        return plain_amplitudes(model)
