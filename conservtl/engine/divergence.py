"""Values that are not finite: the run stops and names the input, the example, the gradient or the weights."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from conservtl.batches import batch_size, tensors_of
from conservtl.engine.batch import Batch, Batches, examples_of
from conservtl.engine.held import Held
from conservtl.errors import TrainingDivergedError
from conservtl.kernels.dtensor import local

if TYPE_CHECKING:
    from conservtl.engine.snapshot import State

__all__ = [
    "Glance",
    "Losses",
    "check_scale",
    "check_weights",
    "finite_rows",
    "glance",
    "gradient_error",
    "where_not_finite",
]

_LISTED = 8  # examples that a message lists


@torch.no_grad()
def finite_rows(content: Any) -> dict[str, Tensor]:
    """Return part of a batch -> whether each of its examples is finite, for each tensor of real or complex numbers.

    Nothing is read from a GPU. A tensor without a row for each example has one value.

    >>> finite_rows((torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), torch.tensor([0, 1])))
    {'batch[0]': tensor([ True, False])}
    """
    count = batch_size(content)
    found: dict[str, Tensor] = {}
    for part, value in _parts(content):
        for tensor in tensors_of(value):
            if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout != torch.strided:
                continue
            finite = tensor.isfinite()
            rows = finite.reshape(count, -1).all(1) if tensor.ndim and len(tensor) == count else finite.all()
            found[part] = rows if part not in found or found[part].shape != rows.shape else found[part] & rows
    return found


def where_not_finite(
    rows: Mapping[str, Tensor], index: Tensor | None = None, names: Sequence[str] | None = None
) -> str | None:
    """Return the parts and examples with NaN or infinite values, for a message; None if there are none."""
    said = []
    for part, finite in rows.items():
        if bool(finite.all()):
            continue
        if not finite.ndim:
            said.append(part)
            continue
        wrong = (~finite).nonzero().flatten().tolist()
        places = wrong if index is None else index.cpu()[wrong].tolist()
        shown = [
            f"{place} ({names[row]})" if names and row < len(names) else str(place)
            for row, place in zip(wrong, places, strict=True)
        ]
        more = ", …" if len(shown) > _LISTED else ""
        said.append(f"{part} in example{'s' * (len(shown) > 1)} {', '.join(shown[:_LISTED])}{more}")
    return " and ".join(said) or None


@dataclass(frozen=True)
class Glance:
    """Facts kept of a batch whose loss is read later.

    Args:
        index: positions of its examples in held data; None: it is streamed.
        rows: result of ``finite_rows``, still on the device; empty: the batch can be read again.
        names: of its examples, if it brings them along.
    """

    index: Tensor | None
    rows: Mapping[str, Tensor]
    names: Sequence[str] | None

    def wrong(self, batches: Batches | None, content: Any = None) -> str | None:
        """Return the parts of the batch that are not finite, for a message."""
        rows, names = self.rows, self.names
        if content is not None:
            rows = finite_rows(content)
        elif not rows and isinstance(batches, Held) and self.index is not None:
            rows = finite_rows(batches.take(self.index))
        if names is None and isinstance(batches, Held) and batches.names and self.index is not None:
            names = [batches.names[place] for place in self.index.tolist()]
        return where_not_finite(rows, self.index, names)


def glance(batch: Batch, content: Any, *, at_hand: bool = False) -> Glance:
    """Look at a batch on its device: its memory is free when its loss is read, unless it is still ``at_hand`` then."""
    again = at_hand or (batch.index is not None and content is batch.content)
    return Glance(batch.index, {} if again else finite_rows(content), _names(content))


def _names(content: Any) -> Sequence[str] | None:
    """Return the names that a batch brings along with its examples, as batches of ``Sequences`` do."""
    names = content.get("names") if isinstance(content, Mapping) else None
    return names if isinstance(names, (list, tuple)) and all(isinstance(one, str) for one in names) else None


def _parts(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a batch with the words that lead to them."""
    if isinstance(content, Mapping):
        yield from ((f"batch[{key!r}]", value) for key, value in content.items())
    elif isinstance(content, (tuple, list)):
        yield from ((f"batch[{place}]", value) for place, value in enumerate(content))
    elif is_dataclass(content) and not isinstance(content, type):
        yield from ((f"batch.{field.name}", getattr(content, field.name)) for field in fields(content))
    else:
        yield "batch", content


_LOOK = 50  # steps between two reads of the losses on a GPU: each waits for the device
_LEAST_SCALE = 2.0**-10  # it begins at 2^16; an overflow that is none but fp16's ends long before
_KEPT = "The last good checkpoint is kept"
_ADVICE = f"{_KEPT}; lower training.lr, set training.clip"


@dataclass(frozen=True)
class _Added:
    """A loss that is still to be read."""

    loss: Tensor
    batch: Batch
    number: int
    step: int
    glance: Glance


class Losses:
    """Sums up an epoch's losses in its state, and stops the run at one that is not finite.

    On a GPU the losses of many steps are read together.
    """

    def __init__(
        self,
        state: State,
        device: torch.device,
        batches: Batches | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.state = state
        self._every = 1 if device.type == "cpu" else _LOOK
        self._waiting: list[_Added] = []
        self._batches, self._parameters = batches, parameters or {}

    def add(self, loss: Tensor, batch: Batch, number: int, step: int, content: Any = None) -> None:
        """Add the mean loss of the ``number``-th batch of an epoch, from 1; ``content`` is the batch as augmented."""
        content = batch.content if content is None else content
        if self._every == 1:
            value = loss.item()
            if not math.isfinite(value):
                seen = _Added(loss, batch, number, step, glance(batch, content, at_hand=True))
                raise TrainingDivergedError(self._message(value, seen, content))
            self._count(value, batch)
            return
        self._waiting.append(_Added(loss.detach(), replace(batch, content=None), number, step, glance(batch, content)))
        if len(self._waiting) >= self._every:
            self.look()

    def look(self) -> None:
        """Read and sum up the losses that were added since the last read."""
        waiting, self._waiting = self._waiting, []
        values = torch.stack([one.loss.float() for one in waiting]).tolist() if waiting else []
        for value, one in zip(values, waiting, strict=True):
            if not math.isfinite(value):
                raise TrainingDivergedError(self._message(value, one))
            self._count(value, one.batch)

    def _count(self, value: float, batch: Batch) -> None:
        weight = batch.weight
        self.state.total += value * weight
        self.state.seen += weight

    def _message(self, value: float, one: _Added, content: Any = None) -> str:
        """Return what is known of a loss that is not finite: the input, the weight, or the batch alone."""
        found = one.glance.wrong(self._batches, content)
        if found is None and content is not None:
            for name, parameter in self._parameters.items():  # this process's part: it is alone here
                if parameter.requires_grad and not _finite(parameter):
                    return _of_weight(name, one.step - 1)
        advice = (
            f"{_ADVICE}, or inspect that batch." if found is None else f"{_KEPT}; mend that input, or leave it out."
        )
        where = f"batch {one.number} of epoch {self.state.epoch + 1} (step {one.step}"
        reason = "" if found is None else f", because {found} is not finite"
        return f"the loss is {value} at {where}{examples_of(one.batch, ', examples {}')}){reason}. {advice}"


@torch.no_grad()
def check_weights(parameters: Mapping[str, nn.Parameter], step: int, penalised: Container[str] = ()) -> None:
    """Raise unless all trained parameters are finite: an infinite gradient shows in them before it shows in a loss."""
    for name, parameter in parameters.items():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            starts = step == 1 and name in penalised
            more = ", or check the gradient of a penalty of your own where w = w0" if starts else ""
            raise TrainingDivergedError(_of_weight(name, step, more))


def _of_weight(name: str, step: int, more: str = "") -> str:
    if step == 0:
        return f"{name!r} is not finite before the first step. Mend the weights that the model starts from."
    return f"{name!r} is not finite after step {step}. {_ADVICE}{more}."


def check_scale(scaler: Any, step: int) -> None:
    """Raise if fp16 has skipped so many steps in a row that no gradient is finite at any scale."""
    if scaler is not None and (scale := scaler.get_scale()) < _LEAST_SCALE:
        raise TrainingDivergedError(
            f"fp16 skips each step: the gradients are not finite even at a loss scale of {scale:g} (step {step}). "
            f"{_KEPT}; set training.precision to bf16 or fp32, lower training.lr."
        )


def gradient_error(
    error: RuntimeError, parameters: Mapping[str, nn.Parameter], step: int
) -> TrainingDivergedError | None:
    """Return an error that names the first gradient that is not finite, if torch refused their norm; else None."""
    if "non-finite" not in str(error):  # torch has no class for it
        return None
    wrong = (name for name, one in parameters.items() if one.grad is not None and not _finite(one.grad))
    name = next(wrong, None)
    which = "the norm of all gradients" if name is None else f"the gradient of {name!r}"
    return TrainingDivergedError(
        f"{which} is not finite at step {step}, though the loss is. {_KEPT}; lower training.lr, or look for a "
        "root, a logarithm or a division in the loss whose slope has no bound."
    )


def _finite(tensor: Tensor) -> bool:
    return bool(local(tensor.detach()).isfinite().all())
