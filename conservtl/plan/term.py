"""Terms of the loss that need outputs or activations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import SerializeAsAny
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from conservtl.bounds import Share
from conservtl.errors import SpecError
from conservtl.padding import Padding, padding_of_outputs
from conservtl.plan.decision import Decision

__all__ = ["CLASS_AXIS", "OutputForm", "TaskLoss", "Term", "Terms", "View", "all_of", "numbered"]

CLASS_AXIS = {2: 1, 3: 2, 4: 1, 5: 1}
"""Number of axes of outputs -> the axis of the classes, unless something says it."""
OutputForm = Literal["softmax", "sigmoid", "squared"]
"""softmax: logits of classes that exclude each other. sigmoid: logits of labels that do not, or one logit. squared:
numbers."""


@dataclass(frozen=True)
class TaskLoss:
    """Form in which the task's loss takes the model's outputs.

    Args:
        form: what it takes them as; None: not known.
        why: why the form is not known, for a message.
        axis: the class axis, if the loss says it.
        counted: shape of the outputs without their class axis, false for positions that the loss ignores; None: all
            count.
        aligned: whether labels have positions of their own, as for CTC, which say nothing of the outputs'.
    """

    form: OutputForm | None
    why: str = ""
    axis: int | None = None
    counted: Tensor | None = None
    aligned: bool = False


@dataclass(frozen=True)
class View:
    """Outputs and activations of one model on a batch.

    Args:
        outputs: the model's outputs. If the target has labels of its own: those of the source's head, on the adapted
            body's features or on the source's.
        features: layer -> its output, (N, ...), for the layers in ``Term.taps``. A layer that did not run in this pass
            (layerdrop, stochastic depth) has no entry; one that ran more than once, or that returns several tensors,
            has the entries ``layer``, ``layer [2]``, ``layer [3]``: see ``all_of``.
        entering: module -> its input, (N, ...), for the modules in ``Term.enters``; of the adapted model only.
            Numbered likewise.
        task: how the task's loss takes the outputs; of the adapted model only, for terms that compare outputs.
        padding: padding declared by the model's arguments, or else by the batch; None: none.
        output_padding: padding declared by the model's own outputs; None: that of ``outputs``.
        axes: for each entry of ``features``, the axis of its channels; of the adapted model only.
        passes: forward passes of the whole model that were made.
        of_heads: whether the outputs are the source head's, which may have other positions than the model's.
    """

    outputs: Any
    features: Mapping[str, Tensor] = field(default_factory=dict)
    entering: Mapping[str, Tensor] = field(default_factory=dict)
    task: TaskLoss | None = None
    padding: Padding | None = None
    output_padding: Padding | None = None
    axes: Mapping[str, int] = field(default_factory=dict)
    passes: int = 1
    of_heads: bool = False

    def valid(self, layer: str, features: Tensor, axis: int) -> Tensor | None:
        """Return which positions of a layer's features are no padding.

        Args:
            layer: the layer.
            features: its features, (N, ...).
            axis: their channel axis.

        Returns:
            Shape of the features without the channel axis; None: all positions count.

        Raises:
            SpecError: how the features' positions follow from the inputs' is not known.
        """
        said = self.padding or self.output_padding
        padding = None if said is None else said.of_layer(layer)
        return None if padding is None else padding.mask(features.shape, axis, f"layer {layer!r}")

    def has_positions(self, size: int) -> bool:
        """Return whether lengths or a mask make an axis of this size in outputs (N, size) one of positions."""
        said = self._of_outputs()
        return said is not None and (said.sizes is None or size in said.sizes) and not said.lengths.is_floating_point()

    def _of_outputs(self) -> Padding | None:
        """Return the padding that the outputs declare, or else that of the model's arguments."""
        said = self.output_padding or padding_of_outputs(self.outputs)
        if said is not None:
            return replace(said, sizes=None)  # they are the outputs' own
        return None if self.padding is None else self.padding.of_outputs()

    def counted(self, outputs: Tensor, axis: int | None, *, padding: bool = True) -> Tensor | None:
        """Return which positions of the outputs count: those that are no padding and whose label is not ignored.

        Args:
            outputs: a tensor of this view's outputs.
            axis: its class axis; None: every element is a position.
            padding: whether padding is left out.

        Returns:
            Shape of the outputs without the class axis; None: all positions count.

        Raises:
            SpecError: lengths or a mask do not fit the outputs.
        """
        said = self._of_outputs()
        mask = said.mask(outputs.shape, axis, "the outputs") if padding and said is not None else None
        ignored = None if self.task is None else self.task.counted
        if ignored is None:
            return mask
        shape = [size for place, size in enumerate(outputs.shape) if place != axis]
        if self.of_heads and ignored.ndim == len(shape) > 1 and ignored.shape[0] == shape[0]:
            ignored = _resized(ignored, shape[1:])
        if list(ignored.shape) != shape:
            raise SpecError(
                f"the outputs: labels that are ignored must be at the outputs' positions, {tuple(shape)}; received "
                f"{tuple(ignored.shape)}. Say class_axis."
            )
        return ignored if mask is None else mask & ignored


def _resized(counts: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return which positions of a coarser or finer grid count: those over any position that does."""
    pooled: Tensor = counts.float()[:, None]
    pool = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}.get(len(sizes))
    return counts if pool is None else pool(pooled, list(sizes))[:, 0] > 0


_Value = TypeVar("_Value")


def numbered(records: Mapping[str, Sequence[_Value]]) -> dict[str, _Value]:
    """Return all records under their name, a second one of a name under ``name [2]``, and so on."""
    return {_entry(name, number): one for name, found in records.items() for number, one in enumerate(found, 1)}


def all_of(records: Mapping[str, _Value], name: str) -> list[_Value]:
    """Return all records of a name, in order; none if there is none.

    Args:
        records: ``features``, ``entering`` or ``axes`` of a view.
        name: a layer or module.

    Example:
        >>> all_of({"encoder": 1, "encoder [2]": 2, "head": 3}, "encoder")
        [1, 2]
    """
    found: list[_Value] = []
    while (entry := _entry(name, len(found) + 1)) in records:
        found.append(records[entry])
    return found


def _entry(name: str, number: int) -> str:
    return name if number == 1 else f"{name} [{number}]"


class Term(Decision):
    """A part of the loss that needs outputs or activations. The loss is then task × (the task's loss) + value."""

    taps: tuple[str, ...] = ()
    """Layers whose outputs it needs."""
    enters: tuple[str, ...] = ()
    """Modules whose inputs it needs: the head, for example."""
    reads: tuple[str, ...] = ()
    """Measurements it needs, by name."""
    task: Share = 1.0
    """Factor on the task's own loss."""

    source: ClassVar[bool] = True
    """Whether it needs the source model: a frozen copy is then kept and run on each batch."""
    mean_over_batch: ClassVar[bool] = True
    """Whether the value is a mean over the batch, so that a batch twice over gives the same value."""
    unlabelled: ClassVar[bool] = False
    """Whether it trains on examples without labels."""
    heads: ClassVar[bool] = False
    """Whether it compares outputs, so that the source's head is kept if the target has labels of its own."""

    @abstractmethod
    def value(self, adapted: View, source: View | None, measured: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Return the term, a scalar with its strength in it, the mean over the batch.

        Args:
            adapted: of the trained model, with gradient.
            source: of the source model on the same inputs, without gradient; None if ``source`` is False.
            measured: name of each measurement in ``reads`` -> its tensors, on the device.
        """


Terms = tuple[SerializeAsAny[Term], ...]
