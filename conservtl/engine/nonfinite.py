"""NaN and infinite values in a batch: in which part of it, and in which of its examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from conservtl.batches import batch_size, tensors_of
from conservtl.engine.batch import Batch
from conservtl.engine.held import Held
from conservtl.engine.streamed import Streamed

__all__ = ["Glance", "finite_rows", "glance", "where_not_finite"]

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

    def wrong(self, batches: Held | Streamed | None, content: Any = None) -> str | None:
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
