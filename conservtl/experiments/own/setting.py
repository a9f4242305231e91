"""The setting of a run of a problem that a program holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine import Training
from conservtl.engine.randomness import preserve_rng, seed_all
from conservtl.experiments.own.maker import blank
from conservtl.experiments.run.setting import TARGET_SEED, Setting
from conservtl.plan.plan import Plan
from conservtl.source.itself import check_heads
from conservtl.source.read import SourceLike

if TYPE_CHECKING:
    from conservtl.experiments.own.problem import OwnProblem

__all__ = ["OwnSetting"]


@dataclass(frozen=True)
class OwnSetting(Setting):
    """The starting point of a run; its models are the program's.

    Args:
        problem: what the program holds.
    """

    problem: OwnProblem

    def model(self, outputs: int, *, target: bool = False) -> nn.Module:  # noqa: ARG002
        """Return a new model; ``model.random`` of the settings replaces the values that it holds."""
        with preserve_rng():
            seed_all(self.spec.seed + TARGET_SEED * target)
            made = self.problem.task.make()
            return blank(made) if self.spec.model.random else made

    def random_model(self) -> nn.Module:
        """Return a model with random values.

        Raises:
            SpecError: the program gave a model with values, and a module of it cannot initialise them.
        """
        made = self.model(len(self.domains.labels), target=True)
        if self.spec.model.random or not self.problem.filled:
            return made
        with preserve_rng():
            seed_all(self.spec.seed + TARGET_SEED)
            return blank(made)

    def adaptation(self, source: SourceLike) -> Adaptation:
        """Apply the strategies to a model for the target, from this source.

        Raises:
            SourceError: a strategy compares outputs with a source that has no head.
        """
        adaptation = super().adaptation(source)
        check_heads(adaptation.plan, self.problem.headless)
        return adaptation

    @property
    def declared_fresh(self) -> dict[str, str]:
        """Globs of what does not start from the source although it fits -> the reason."""
        return dict(self.problem.fresh)

    @property
    def adapt_options(self) -> dict[str, Any]:
        """Arguments of ``adapt`` that say what layers and head are, and what may be missing."""
        return super().adapt_options | {"allow": self.problem.allow}

    def selecting(self, training: Training) -> Training:
        """Return settings that select on the headline metric; without an optimizer if the program gives a class."""
        settings = super().selecting(training)
        if self.problem.optimizer is None:
            return settings
        return Training.model_validate(settings.model_dump(exclude={"optimizer"}))

    def fit_arguments(self, plan: Plan) -> dict[str, Any]:
        """Return the arguments of ``fit`` that follow from problem and seed; losses are checked by ``fit``."""
        functions = vars(self.problem.task.functions)
        return super().fit_arguments(plan) | functions | {"optimizer": self.problem.optimizer}
