"""Labelled sequences of different lengths: padded batch by batch, never as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conservtl.errors import DataError

__all__ = ["Sequences", "joined"]

_PADDED = -100  # label of a position that does not count


@dataclass(frozen=True)
class Sequences:
    """Labelled sequences of different lengths, such as utterances and their texts.

    A batch is a dictionary: ``inputs`` (N, positions, ...), zero where padded; ``lengths`` (N,); ``labels``
    (N, tokens), -100 where padded; and ``names``, a list.

    Args:
        inputs: N sequences, (positions, ...) float32 each: a tuple, or an object that reads one when it is indexed.
        labels: N sequences of tokens, (tokens,) int64 each.
        names: N names that a person can find the examples by.
        groups: the group of each example, such as its speaker; empty: there are none.
        seconds: the duration of each example, known without reading it.

    Example:
        >>> import torch
        >>> data = Sequences((torch.ones(3, 2), torch.ones(1, 2)), (torch.tensor([1]), torch.tensor([1, 2])),
        ...                  ("a", "b"), (), (0.3, 0.1))
        >>> batch = data.batch([0, 1])
        >>> batch["inputs"].shape, batch["lengths"].tolist(), batch["labels"].tolist()
        (torch.Size([2, 3, 2]), [3, 1], [[1, -100], [1, 2]])
    """

    inputs: Sequence[Tensor]
    labels: tuple[Tensor, ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        fields = ("inputs", "labels", "names", "seconds", *(("groups",) if self.groups else ()))
        counts = {name: len(getattr(self, name)) for name in fields}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise DataError(f"Sequences must have as many of each for every example; received {listed}. Match them.")

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Sequence[int]) -> Sequences:
        """Return the examples at these positions, in this order."""
        places = list(index)
        chosen = tuple(self.inputs[place] for place in places) if isinstance(self.inputs, tuple) else None
        return replace(
            self,
            inputs=_Chosen(self.inputs, places) if chosen is None else chosen,
            labels=tuple(self.labels[place] for place in places),
            names=tuple(self.names[place] for place in places),
            groups=tuple(self.groups[place] for place in places) if self.groups else (),
            seconds=tuple(self.seconds[place] for place in places),
        )

    def batch(self, index: Sequence[int]) -> dict[str, Any]:
        """Return the examples at these positions as a padded batch."""
        inputs = [self.inputs[place] for place in index]
        return {
            "inputs": pad_sequence(inputs, batch_first=True),
            "lengths": torch.tensor([len(one) for one in inputs]),
            "labels": pad_sequence([self.labels[place] for place in index], batch_first=True, padding_value=_PADDED),
            "names": [self.names[place] for place in index],
        }


def joined(parts: Sequence[Sequences]) -> Sequences:
    """Return the examples of all parts in one."""
    grouped = all(part.groups for part in parts)
    return Sequences(
        inputs=_Joined([part.inputs for part in parts]),
        labels=tuple(one for part in parts for one in part.labels),
        names=tuple(one for part in parts for one in part.names),
        groups=tuple(one for part in parts for one in part.groups) if grouped else (),
        seconds=tuple(one for part in parts for one in part.seconds),
    )


class _Joined(Sequence[Tensor]):
    """The inputs of several parts, one after another."""

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        self._places = [(part, place) for part in parts for place in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        part, inside = self._places[place]
        return part[inside]


class _Chosen(Sequence[Tensor]):
    """Some of the inputs of an object that reads them when they are indexed."""

    def __init__(self, inputs: Sequence[Tensor], places: Sequence[int]) -> None:
        self._inputs, self._places = inputs, list(places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        return self._inputs[self._places[place]]
