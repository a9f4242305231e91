"""Learning hidden unit contributions: an amplitude for each hidden unit, and little else to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from conservtl.conserve import lhuc
from conservtl.errors import PlanError
from conservtl.layers import Layer
from conservtl.plan import Plan
from conservtl.strategies.base import Order, Strategy

__all__ = ["LHUC"]

_REASON = "amplitudes of hidden units, which start at 1"


class LHUC(Strategy):
    r"""Scale each hidden unit by an amplitude of its own between 0 and 2, learned from the target.

    .. math:: h' = 2\,\sigma(r) \circ h

    with r = 0 at the start, so that the model computes what it did; its parameters keep their names, and r stands
    beside them as ``lhuc``. A weight decay on r, the optimizer's or ``L2SP(beta=..., on="all")``, pulls to amplitude 1.

    What is scaled is the output of a linear map or convolution, or of the norm behind it: for a ReLU that is the same
    as scaling what the ReLU gives, as the amplitude is positive; for other activations it is the variant that scales
    before them. Of a recurrent layer it is the output at each step (for several levels, of the last); its state is not
    scaled. ``merge`` (``adaptation.merged()``) multiplies the amplitudes into weights and biases, exactly to rounding,
    so that the adapted model costs nothing; those of recurrent layers stay.

    Amplitudes want a larger rate than weights: with AdamW on spoken digits, 3e-2 did better than 1e-2.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: -0.6 ± 0.4, -0.7 ± 0.4 and -1.3 ± 1.7
    (benchmarks/results/methods.md). So it loses to it for a speaker: a few numbers to keep for each are its gain, not
    accuracy.

    Cost: one number a unit to train and to keep for each speaker, a product a layer in each step.

    Reference:
        Swietojanski and Renals 2014, "Learning hidden unit contributions for unsupervised speaker adaptation of neural
        network acoustic models", section 2. Swietojanski, Li and Renals 2016, "Learning hidden unit contributions for
        unsupervised acoustic model adaptation", section III.
    """

    kind: Literal["lhuc"] = "lhuc"
    order: ClassVar[Order] = Order.HEAD
    on: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Globs of layers or modules whose units are scaled. None: all layers but the last."""
    freeze: bool = True
    """Whether everything but the amplitudes, and what else is fresh, is frozen."""

    @property
    def extends(self) -> bool:
        """It adds amplitudes."""
        return True

    def apply(self, plan: Plan) -> Plan:
        """Choose what is frozen."""
        if not any(row.added and row.name.rpartition(".")[2] == lhuc.PARAMETER for row in plan.rows):
            raise PlanError(f"{self.label}: the plan's model has no amplitudes. Let adapt(model, ...) put them there.")
        if not self.freeze:
            return plan
        rows = [row for row in plan.rows if "frozen" in row.chosen or not row.frozen]  # what has no gradient stays
        frozen = {row.name: {"frozen": row.origin == "source"} for row in rows}
        return plan.choose(self.label, "frozen", frozen, explicit=False)

    def extend(self, model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, str]:
        """Put amplitudes of 1 on the hidden units."""
        return dict.fromkeys(lhuc.extend(model, lhuc.hidden_units(model, layers, self.on, example)), _REASON)

    def retract(self, model: nn.Module) -> None:
        """Take the amplitudes away."""
        lhuc.retract(model)

    def merge(self, model: nn.Module) -> bool:
        """Multiply the amplitudes into the weights they scale."""
        return lhuc.merge(model)
