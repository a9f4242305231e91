"""Padding of a batch, as a mask at any resolution inside a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conservtl.errors import SpecError

__all__ = ["Padding", "Resampling", "ends"]


@dataclass(frozen=True)
class Resampling:
    """A module that changed the number of positions: the sizes of its spatial axes, and how a length changes there.

    Args:
        sizes: (before, after) of each spatial axis.
        lengths: of each spatial axis: lengths before -> lengths after.
    """

    sizes: tuple[tuple[int, int], ...]
    lengths: tuple[Callable[[Tensor], Tensor], ...]


@dataclass(frozen=True)
class Padding:
    """Positions of the examples of a batch that are no padding.

    Args:
        lengths: (N,), integers, or shares of all positions in (0, 1].
        sizes: numbers of positions that the lengths may count of, or be shares of; None: those of the tensor at hand.
        valid: (N, positions), the mask that was given; None: lengths were given.
        resamplings: modules that changed the number of positions, in the order of the forward pass.
        decoder: the padding of a decoder's positions, with which those of its outputs go; None: not known.
        has_decoder: whether outputs have the decoder's positions.
        refusal: why lengths or mask cannot be used; raised once positions are masked by them.
    """

    lengths: Tensor
    sizes: tuple[int, ...] | None = None
    valid: Tensor | None = None
    resamplings: tuple[Resampling, ...] = ()
    decoder: Padding | None = None
    has_decoder: bool = False
    refusal: str | None = None

    def of_layer(self, name: str) -> Padding | None:
        """Return the padding of a layer: the decoder's, if it is in a decoder beside an encoder."""
        return self.decoder if self.has_decoder and "decoder" in name.split(".") else self

    def of_outputs(self) -> Padding | None:
        """Return the padding of the model's outputs."""
        return self.decoder if self.has_decoder else self

    def mask(self, shape: Sequence[int], channel: int | None, subject: str) -> Tensor | None:
        """Return which positions of a tensor count; None if it has no positions.

        Args:
            shape: of the tensor, (N, ...).
            channel: axis that is not of positions; None: all but the first are.
            subject: what the tensor is, for messages.

        Returns:
            Shape without the channel axis; false for padding.

        Raises:
            SpecError: lengths or mask do not fit the tensor, or its number of positions has an unknown relation to
                that of the inputs.
        """
        rows = len(self.lengths)
        axes = [axis for axis in range(1, len(shape)) if axis != channel]
        kept = [size for axis, size in enumerate(shape) if axis != channel]
        if not axes and shape[0] == rows:
            return None
        if shape[0] == 1 < rows:  # the same for all examples, as embeddings of positions
            whole = self.mask((rows, *shape[1:]), channel, subject)
            return None if whole is None else whole.any(0, keepdim=True)
        if self.refusal is not None:
            raise SpecError(f"{subject}: {self.refusal}")
        if shape[0] != rows:
            return self._of_flat(shape, kept, subject)
        found = [hit for one in self._readings if (hit := one.first(shape, axes)) is not None]
        masks = [(mask, axis) for rank, mask, axis in found if rank == min(hit[0] for hit in found)]
        if len({axis for _, axis in masks}) > 1 and not all(bool(mask.all()) for mask, _ in masks):
            raise SpecError(
                f"{subject}: the lengths are shares of {' or '.join(map(str, self.sizes or ()))} positions, and which "
                f"axis of shape {tuple(shape)} these are is not known. Give lengths as integers, or compare layers "
                "with one such axis."
            )
        if masks:
            mask, axis = masks[0]
            place = axis if channel is None or axis < channel else axis - 1
            wide = [1] * len(kept)
            wide[0], wide[place] = rows, shape[axis]
            return mask.view(wide).expand(kept)
        of = "" if self.sizes is None else f" of {' or '.join(map(str, self.sizes))}"
        raise SpecError(
            f"{subject}: padding must be left out, but how the positions of shape {tuple(shape)} follow from the "
            f"inputs' lengths{of} is not known. Return (logits, lengths) or lengths among the outputs, compare layers "
            "with the inputs' positions, or set padding='count' to count padding."
        )

    def take(self, index: Tensor) -> Padding:
        """Return the padding of the examples at these positions, which the host knows."""
        index = index.to(self.lengths.device, non_blocking=index.device.type == "cpu")
        return replace(
            self,
            lengths=self.lengths[index],
            valid=None if self.valid is None else self.valid[index],
            decoder=None if self.decoder is None else self.decoder.take(index),
        )

    @staticmethod
    def joined(parts: Sequence[Padding]) -> Padding:
        """Return the padding of the examples of all parts, which have the same number of positions."""
        first = parts[0]
        if len({one.lengths.is_floating_point() for one in parts}) > 1:
            return Padding.joined([one.as_shares() for one in parts])
        sizes = [set(one.sizes) for one in parts if one.sizes is not None]
        common = None if first.sizes is None else tuple(s for s in first.sizes if all(s in each for each in sizes))
        decoders = [one.decoder for one in parts if one.decoder is not None]
        return replace(
            first,
            lengths=torch.cat([one.lengths for one in parts]),
            sizes=common,
            valid=None if first.valid is None else torch.cat([one.valid for one in parts if one.valid is not None]),
            decoder=Padding.joined(decoders) if decoders else None,
            refusal=next((one.refusal for one in parts if one.refusal is not None), None),
        )

    @property
    def _readings(self) -> list[Padding]:
        """What shares of several numbers of positions may mean; one that counts them is itself."""
        if not self._relative or self.sizes is None:
            return [self]
        return [replace(self, lengths=(self.lengths * size).round().long(), sizes=(size,)) for size in self.sizes]

    def first(self, shape: Sequence[int], axes: Sequence[int]) -> tuple[int, Tensor, int] | None:
        """Return the mask on the last axis that has such positions, and first its rank (0: the inputs' own)."""
        for rank, find in enumerate((self._same, self._resampled, self._proportional)):
            for axis in reversed(axes):
                if (mask := find(shape[axis])) is not None:
                    return rank, mask, axis
        return None

    @property
    def _relative(self) -> bool:
        return self.lengths.is_floating_point()

    def as_shares(self) -> Padding:
        """Return the padding with lengths as shares of all positions."""
        return self if self._relative else replace(self, lengths=self.lengths / max(self.sizes or (1,)))

    def _of_flat(self, shape: Sequence[int], kept: Sequence[int], subject: str) -> Tensor | None:
        """Return the mask of a tensor whose first axis is that of all examples' positions."""
        rows = len(self.lengths)
        packed = not self._relative and shape[0] == int(self.lengths.sum())
        if packed:  # PackedSequence holds no padding
            return None
        whole = self._same(shape[0] // rows) if shape[0] % rows == 0 and len(kept) == 1 else None
        if whole is None and len(kept) == 1 and self.sizes is not None and shape[0] in self.sizes:
            # Positions alone, the same for all examples, as embeddings of positions.
            alike = self._same(shape[0])
            return None if alike is None else alike.any(0)
        if shape[0] % rows == 0 and len(kept) == 1:
            for find in (self._same, self._resampled, self._proportional):
                if (mask := find(shape[0] // rows)) is not None:
                    return mask.flatten()
        if self._is_whole():  # a tensor without examples, such as Whisper's positions, of inputs without padding
            return None
        raise SpecError(
            f"{subject}: lengths or mask must have one row for each example; received {rows} for a tensor of shape "
            f"{tuple(shape)}. Give one length for each example, and examples on the first axis."
        )

    def _is_whole(self) -> bool:
        """Return whether no position of any example is padding."""
        if self.valid is not None:
            return bool(self.valid.all())
        whole = 1 if self._relative else (self.sizes or (0,))[0]
        return bool((self.lengths == whole).all()) and (self._relative or len(self.sizes or ()) == 1)

    def _same(self, size: int) -> Tensor | None:
        """Return the mask at a number of positions that the lengths count of."""
        if self._relative:
            return _within((self.lengths * size).round().long().clamp(min=1), size)
        if self.valid is not None:
            return self.valid if self.valid.shape[1] == size else None
        if self.sizes is not None and size not in self.sizes:
            return None
        low, high = ends(self.lengths)
        if not 1 <= low <= high <= size:
            raise SpecError(
                f"lengths must be from 1 to the number of positions, {size}; received {low} to {high}. "
                "Give the number of frames of each example that are no padding."
            )
        return _within(self.lengths, size)

    def _resampled(self, size: int) -> Tensor | None:
        """Return the mask behind modules that changed the number of positions, by their own arithmetic."""
        axes = max((len(one.sizes) for one in self.resamplings), default=0)
        for start in self.sizes or ():
            for axis in range(axes):
                if self._contiguous() and (lengths := self._followed(start, size, axis)) is not None:
                    return _within(lengths, size)
        return None

    def _followed(self, start: int, size: int, axis: int) -> Tensor | None:
        """Return the lengths at a number of positions that modules made of others, one after or beside another."""
        known = {start: self.lengths}
        for one in self.resamplings:
            place = min(axis, len(one.sizes) - 1)
            before, after = one.sizes[place]
            if before in known:
                known.setdefault(after, one.lengths[place](known[before]).clamp(1, after))
        return known.get(size)

    def _proportional(self, size: int) -> Tensor | None:
        """Return the mask at a whole multiple or fraction of the positions."""
        for start in self.sizes or ():
            if start % size == 0:
                if self.valid is not None:
                    return self.valid.view(len(self.valid), size, -1).any(-1)
                return _within((self.lengths + start // size - 1) // (start // size), size)
            if size % start == 0:
                repeats = size // start
                return (
                    _within(self.lengths * repeats, size)
                    if self.valid is None
                    else self.valid.repeat_interleave(repeats, 1)
                )
        return None

    def _contiguous(self) -> bool:
        """Whether each example's positions are the first ones."""
        return self.valid is None or bool((self.valid == _within(self.lengths, self.valid.shape[1])).all())


def ends(lengths: Tensor) -> list[float]:
    """Return the least and the largest length, read at once: each read waits for a GPU."""
    found: list[float] = torch.stack(torch.aminmax(lengths)).tolist()
    return found


def _within(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[:, None]
