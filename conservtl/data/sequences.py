"""Labelled sequences of different lengths: padded batch by batch, never as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conservtl.errors import DataError

__all__ = ["Sequences", "joined"]

_PADDED = -100  # label of a position that does not count
_OPTIONAL = ("groups", "labelled")


@dataclass(frozen=True)
class Sequences:
    """Labelled sequences of different lengths, such as utterances and their texts.

    A batch is a dictionary: ``inputs`` (N, positions, ...), zero where padded; ``lengths`` (N,); ``labels``
    (N, tokens), -100 where padded; ``names``, a list; ``draw``, if inputs are changed at random; and ``labelled`` (N,),
    whether an example has labels to learn, if some have none.

    Args:
        inputs: N sequences, (positions, ...) float32 each: a tuple, or an object that reads one when it is indexed. An
            object with ``varied(place, generator)`` (None: at its shortest) and ``durations`` (the
            shortest and longest of a changed input, as multiples of its own) changes inputs at random in training.
        labels: N sequences of tokens, (tokens,) int64 each.
        names: N names that a person can find the examples by.
        groups: the group of each example, such as its speaker; empty: there are none.
        seconds: the duration of each example, known without reading it.
        labelled: whether each example has labels to learn; empty: all have.

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
    labelled: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        fields = ("inputs", "labels", "names", "seconds", *(name for name in _OPTIONAL if getattr(self, name)))
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
            labelled=tuple(self.labelled[place] for place in places) if self.labelled else (),
        )

    @property
    def durations(self) -> tuple[float, float] | None:
        """Shortest and longest duration of a changed input, as multiples of its own; None: inputs do not change."""
        return _durations(self.inputs)

    def on(self, device: torch.device, place: Callable[[int, torch.device], torch.device]) -> Sequences:
        """Return the data with inputs that are made on a device, if they are objects with ``on(device, place)``.

        Args:
            device: of the batches.
            place: (bytes, device) -> where an input is kept.
        """
        return replace(self, inputs=_on(self.inputs, device, place))

    def batch(self, index: Sequence[int], draw: int | None = None) -> dict[str, Any]:
        """Return the examples at these positions as a padded batch.

        Args:
            index: the positions.
            draw: seed of an epoch. Inputs that can change at random do so by this seed and their example's name, so
                that neither order nor batches matter. None: inputs as they are.
        """
        if draw is None:
            return self._padded(index, [self.inputs[place] for place in index])
        inputs = [_varied(self.inputs, place, _generator(draw, self.names[place])) for place in index]
        return {**self._padded(index, inputs), "draw": draw}

    def densest(self, count: int) -> dict[str, Any]:
        """Return the examples with the most labels a second, at most ``count``, as a batch; inputs at their shortest.

        If inputs change, it has a ``draw`` of None.
        """

        def density(place: int) -> float:
            return len(self.labels[place]) / max(self.seconds[place], 1e-9)

        index = sorted(range(len(self)), key=density, reverse=True)[:count]
        if self.durations is None:
            return self.batch(index)
        return {**self._padded(index, [_varied(self.inputs, place, None) for place in index]), "draw": None}

    def _padded(self, index: Sequence[int], inputs: list[Tensor]) -> dict[str, Any]:
        device = next((one.device for one in inputs if one.device.type != "cpu"), None)
        inputs = inputs if device is None else [one.to(device) for one in inputs]
        known = {"labelled": torch.tensor([self.labelled[place] for place in index])} if self.labelled else {}
        return {
            **known,
            "inputs": pad_sequence(inputs, batch_first=True),
            "lengths": torch.tensor([len(one) for one in inputs]),
            "labels": pad_sequence([self.labels[place] for place in index], batch_first=True, padding_value=_PADDED),
            "names": [self.names[place] for place in index],
        }


def joined(parts: Sequence[Sequences]) -> Sequences:
    """Return the examples of all parts in one."""
    grouped = all(part.groups for part in parts)
    known = [part.labelled or (True,) * len(part) for part in parts]
    return Sequences(
        inputs=_Joined([part.inputs for part in parts]),
        labels=tuple(one for part in parts for one in part.labels),
        names=tuple(one for part in parts for one in part.names),
        groups=tuple(one for part in parts for one in part.groups) if grouped else (),
        seconds=tuple(one for part in parts for one in part.seconds),
        labelled=() if all(map(all, known)) else tuple(one for part in known for one in part),
    )


def _durations(inputs: Sequence[Tensor]) -> tuple[float, float] | None:
    return getattr(inputs, "durations", None)


def _on(inputs: Any, device: torch.device, place: Callable[[int, torch.device], torch.device]) -> Any:
    return inputs.on(device, place) if hasattr(inputs, "on") else inputs


def _varied(inputs: Any, place: int, generator: torch.Generator | None) -> Tensor:
    changed: Tensor = inputs[place] if _durations(inputs) is None else inputs.varied(place, generator)
    return changed


def _generator(draw: int, name: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(f"{draw}/{name}".encode()).digest()[:7])
    return torch.Generator().manual_seed(seed)


class _Joined(Sequence[Tensor]):
    """The inputs of several parts, one after another."""

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        self._places = [(part, place) for part in parts for place in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        part, inside = self._places[place]
        return part[inside]

    def on(self, device: torch.device, place: Callable[[int, torch.device], torch.device]) -> _Joined:
        """Return the inputs of the parts, made on a device."""
        moved = _Joined([])
        moved._places = [(_on(part, device, place), inside) for part, inside in self._places]
        return moved

    @property
    def durations(self) -> tuple[float, float] | None:
        """The shortest and longest of the parts; None: none of them changes."""
        parts = [one for one in {id(part): _durations(part) for part, _ in self._places}.values() if one is not None]
        return (min(one[0] for one in parts), max(one[1] for one in parts)) if parts else None

    def varied(self, place: int, generator: torch.Generator | None) -> Tensor:
        """Return an input that changes if its part does."""
        part, inside = self._places[place]
        return _varied(part, inside, generator)


class _Chosen(Sequence[Tensor]):
    """Some of the inputs of an object that reads them when they are indexed."""

    def __init__(self, inputs: Sequence[Tensor], places: Sequence[int]) -> None:
        self._inputs, self._places = inputs, list(places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        return self._inputs[self._places[place]]

    def on(self, device: torch.device, place: Callable[[int, torch.device], torch.device]) -> _Chosen:
        """Return the chosen inputs, made on a device."""
        return _Chosen(_on(self._inputs, device, place), self._places)

    @property
    def durations(self) -> tuple[float, float] | None:
        """As of the object."""
        return _durations(self._inputs)

    def varied(self, place: int, generator: torch.Generator | None) -> Tensor:
        """Return a changed input."""
        return _varied(self._inputs, self._places[place], generator)
