"""Choices made before training by trying candidates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from pydantic import SerializeAsAny

from conservtl.bounds import Count
from conservtl.plan.decision import Decision

__all__ = ["Search", "Searches"]


class Search(Decision):
    """A choice made before training: each candidate is trained on a copy and scored on the validation part."""

    epochs: Count | None = None
    """Length of each trial; None: a fifth of the run's, at least one."""

    @property
    def remedy(self) -> str:
        """Sentence that says what to call in a training loop without ``fit``."""
        return "Call conservtl.best_block(adaptation, train, valid) before optimizer(...)."

    @abstractmethod
    def trials(self) -> Mapping[str, Mapping[str, str]]:
        """Return each candidate's name with the facts by which the plan is drawn up to try that candidate.

        With these facts in ``plan.facts`` the strategy must decide, and no longer ask for this search.
        """

    def decide(self, scores: Mapping[str, float]) -> Mapping[str, str]:
        """Return the facts of the run; by default those of the best candidate, the first of equals.

        Args:
            scores: candidate -> its validation score, higher is better.
        """
        return self.trials()[max(scores, key=scores.__getitem__)]


Searches = tuple[SerializeAsAny[Search], ...]
