"""Settings that a task may take from the source's weights, or from its model; most tasks take none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from conservtl.data import Domains

__all__ = ["SourceHooks"]


class SourceHooks:
    """Methods of a task around the source model, each with a default that changes nothing."""

    def adopt(self, data: Any, preprocessing: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """Return the ``data`` section with what it leaves open set as in the run that saved the source's weights.

        Args:
            data: the spec's ``data`` section.
            preprocessing: of that run, as JSON. Settings that differ from it after ``load`` are refused.
        """
        return data

    def completed(self, data: Any, domains: Domains, source: nn.Module, *, seed: int) -> Domains:  # noqa: ARG002
        """Return the domains with what only the source model can add to them, such as labels of its own for examples.

        Called once the source model is there, before anything is adapted.

        Args:
            data: the spec's ``data`` section.
            domains: as ``load`` gave them.
            source: the source model, in eval mode.
            seed: the spec's.
        """
        return domains

    def beside(self, data: Any, weights: Any) -> Any:  # noqa: ARG002
        """Return the ``data`` section with what it leaves open set as the files beside the source's weights say.

        Args:
            data: the spec's ``data`` section.
            weights: a path, or a name such as ``hf:ORG/NAME@REVISION``; not of an earlier run.

        Raises:
            SpecError: the section contradicts them.
        """
        return data

    def architecture(self, model: Any, weights: Any) -> Any:  # noqa: ARG002
        """Return the ``model`` section with what it leaves open set as the files beside the source's weights say.

        Args:
            model: the spec's ``model`` section.
            weights: as for ``beside``.

        Raises:
            SpecError: the section contradicts them.
        """
        return model

    def outputs(self, data: Any, labels: tuple[str, ...] | None) -> tuple[tuple[str, ...] | None, ...]:  # noqa: ARG002
        """Return the labels of the weights' outputs, and the same in the order that the task needs.

        Args:
            data: the spec's ``data`` section.
            labels: ``source.labels`` of the spec; None: the data's, unless the section says otherwise.
        """
        return labels, labels
