"""A strategy that acts on the weights at each step, through a decision of its own: noise after the step.

python examples/extend/weight_noise.py
"""

from typing import Literal

import torch
from pydantic import Field

from conservtl import Plan, Strategy
from conservtl.plan import Step, Update


class NoiseUpdate(Update):
    """Gaussian noise on weights after each step."""

    kind: Literal["weight_noise"] = "weight_noise"
    size: float
    """Standard deviation."""

    def describe(self) -> str:
        """Return a line for the plan's table."""
        return f"noise of {self.size:g} on {len(self.names)} parameters"

    def after(self, step: Step, state: dict[str, torch.Tensor]) -> None:
        """Add noise that is the same in every process and after resuming; none if the step is skipped."""
        generator = torch.Generator().manual_seed(step.number)
        for item in step.moving:
            noise = self.size * torch.randn(item.parameter.shape, generator=generator).to(item.parameter)
            item.parameter.add_(noise if step.skip is None else noise * (step.skip == 0))


class WeightNoise(Strategy):
    """Train the parameters from the source with noise on them."""

    kind: Literal["weight_noise"] = "weight_noise"
    size: float = Field(default=1e-3, ge=0, description="Standard deviation of the noise.")

    def apply(self, plan: Plan) -> Plan:
        """Add the update to the plan."""
        names = tuple(row.name for row in plan.rows if row.origin == "source")
        return plan.with_update(NoiseUpdate(by=self.label, names=names, size=self.size))


if __name__ == "__main__":
    from conservtl.testing import check_strategy

    check_strategy(WeightNoise())
    print("WeightNoise keeps the contract of a strategy.")
