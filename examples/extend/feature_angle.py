r"""A term on features: the angle between the adapted model's feature vectors and the source's.

.. math:: \alpha \left(1 - \frac{f \cdot f^0}{|f| |f^0|}\right), \text{ the mean over positions and examples}

python examples/extend/feature_angle.py
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import cosine_similarity

from conservtl import Plan, Strategy
from conservtl.plan import Term, View


class AngleTerm(Term):
    """Needs the source's features, so a frozen copy of the source model is run on each batch."""

    kind: Literal["feature_angle"] = "feature_angle"
    alpha: float
    """Strength."""

    def describe(self) -> str:
        """Return a line for the plan's table."""
        return f"{self.alpha:g} × angle to the source's features at {', '.join(self.taps)}"

    def value(
        self, adapted: View, source: View | None, measured: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> torch.Tensor:
        """Return the term: layers that did not run in this pass have no entry, and padding is left out."""
        values = []
        for layer, features in adapted.features.items():
            axis = adapted.axes[layer]
            angles = 1 - cosine_similarity(features, source.features[layer], dim=axis)
            counts = adapted.valid(layer, features, axis)
            if counts is None:
                counts = torch.ones_like(angles, dtype=torch.bool)
            values.append(angles.where(counts, 0).sum() / counts.sum().clamp(min=1))
        return self.alpha * torch.stack(values).mean() if values else torch.zeros(())


class FeatureAngle(Strategy):
    """Keep the direction of features, whatever their length."""

    kind: Literal["feature_angle"] = "feature_angle"
    alpha: float = Field(default=0.1, ge=0, description="Strength.")
    layers: tuple[str, ...] | None = Field(default=None, description="Globs of layers. None: the last before the head.")

    def apply(self, plan: Plan) -> Plan:
        """Add the term to the plan."""
        if self.layers is None:
            taps = plan.own_layers[-2:-1] or plan.own_layers
        else:
            matched = plan.select_layers(self.layers).values()
            taps = tuple(layer for layer in plan.layers if any(layer in names for names in matched))
        return plan.with_term(AngleTerm(by=self.label, taps=taps, alpha=self.alpha))


if __name__ == "__main__":
    from conservtl.testing import check_strategy

    check_strategy(FeatureAngle())
    print("FeatureAngle keeps the contract of a strategy.")
