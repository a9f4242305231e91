"""Padding: the positions of each example that are none, at any resolution inside a model.

Padding is found by name among the arguments of a model or the entries of a batch:

- ``lengths``, ``input_lengths``, ``wav_lens`` and the like: (N,), integers from 1 to the number of positions, or shares
  of it above 0 and up to 1;
- ``attention_mask``, ``mask``, ``input_mask`` and the like: (N, positions), true or 1 for positions that count;
- ``padding_mask``, ``key_padding_mask`` and the like: (N, positions), true for padding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import SpecError

__all__ = ["Padding", "Resampling", "find_padding", "names_padding", "padding_of_outputs", "padding_of_rows"]

_LENGTHS = re.compile(r"(^|_)(lengths?|lens?|num_frames)$")
_NO_LENGTHS = re.compile(r"label|target|tgt|token|decoder|max|min")
_MASKS = re.compile(r"^((input|inputs|feature|features|frame|frames|valid|sequence|encoder)_)?(attention_)?mask$")
_PADDING = re.compile(r"^(?!.*(decoder|tgt|target|memory)).*padding_mask$")
_OF_OUTPUTS = ("lengths", "output_lengths", "out_lengths", "logit_lengths", "logits_lengths", "mask", "attention_mask")
_EXACT = 1e-3  # largest distance of a share times the number of positions from an integer


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
        sizes: numbers of positions that the lengths may count of; None: those of the tensor at hand.
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
        if self.refusal is not None:
            raise SpecError(f"{subject}: {self.refusal}")
        if shape[0] != rows:
            return self._of_flat(shape, kept, subject)
        for find in (self._same, self._resampled, self._proportional):
            for axis in reversed(axes):
                if (mask := find(shape[axis])) is not None:
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
        """Return the padding of these examples."""
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
    def _relative(self) -> bool:
        return self.lengths.is_floating_point()

    def _of_flat(self, shape: Sequence[int], kept: Sequence[int], subject: str) -> Tensor | None:
        """Return the mask of a tensor whose first axis is that of all examples' positions."""
        rows = len(self.lengths)
        packed = not self._relative and shape[0] == int(self.lengths.sum())
        if packed:  # PackedSequence holds no padding
            return None
        if shape[0] % rows == 0 and len(kept) == 1:
            for find in (self._same, self._resampled, self._proportional):
                if (mask := find(shape[0] // rows)) is not None:
                    return mask.flatten()
        raise SpecError(
            f"{subject}: lengths or mask must have one row for each example; received {rows} for a tensor of shape "
            f"{tuple(shape)}. Give one length for each example, and examples on the first axis."
        )

    def _same(self, size: int) -> Tensor | None:
        """Return the mask at a number of positions that the lengths count of."""
        if self._relative:
            return _within((self.lengths * size).round().long().clamp(min=1), size)
        if self.valid is not None:
            return self.valid if self.valid.shape[1] == size else None
        if self.sizes is not None and size not in self.sizes:
            return None
        low, high = (int(one) for one in (self.lengths.min(), self.lengths.max()))
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
        lengths, now = self.lengths, start
        for one in self.resamplings:
            place = min(axis, len(one.sizes) - 1)
            before, after = one.sizes[place]
            if before == now:
                lengths, now = one.lengths[place](lengths).clamp(1, after), after
            if now == size:
                return lengths
        return None

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


def names_padding(names: Iterable[str]) -> bool:
    """Return whether an argument or entry of these names may say what is padding."""
    return any(_is_lengths(name) or _MASKS.match(name) or _PADDING.match(name) for name in names)


def find_padding(arguments: Mapping[str, Any], names: Iterable[str] = ()) -> Padding | None:
    """Return the padding that a model's arguments or a batch's entries say; None if none does.

    Args:
        arguments: name -> value.
        names: of all arguments that the model takes: with those of a decoder, outputs have its positions.
    """
    has_decoder = any(name.startswith("decoder_input") for name in (*names, *arguments))
    found = next(_found(arguments), None)
    if not has_decoder:
        return found
    decoder = _of_decoder(arguments)
    if found is None and decoder is not None:  # nothing is known of the encoder: all its positions count
        found = Padding(torch.ones(len(decoder.lengths), device=decoder.lengths.device))
    return None if found is None else replace(found, decoder=decoder, has_decoder=True)


def padding_of_outputs(outputs: Any) -> Padding | None:
    """Return the padding that outputs say: (logits, lengths), (logits, mask), or an entry ``lengths`` or ``mask``."""
    said: Any = None
    name = "lengths"
    if isinstance(outputs, (tuple, list)):
        logits, said = outputs[0] if outputs else None, outputs[1] if len(outputs) > 1 else None
    else:
        entries = outputs if isinstance(outputs, Mapping) else vars(outputs) if hasattr(outputs, "__dict__") else {}
        logits = entries.get("logits")
        name, said = next(((key, entries[key]) for key in _OF_OUTPUTS if isinstance(entries.get(key), Tensor)), ("", 0))
    if not isinstance(said, Tensor) or not isinstance(logits, Tensor) or logits.ndim < 2:
        return None
    if logits.ndim == 2 and not _counts_of(said, logits):
        return None
    if said.ndim == 2 and said.shape[0] == len(logits) and (said.dtype == torch.bool or "mask" in name):
        return _from_mask(said, name)
    if said.ndim != 1:
        return None
    lengths = _checked(said, len(logits), "the lengths among the outputs")
    if lengths.is_floating_point():
        return Padding(lengths)
    most = int(lengths.max())
    sizes = [size for size in logits.shape[1:] if size == most] or [size for size in logits.shape[1:] if size > most]
    if not sizes:
        raise SpecError(
            f"the lengths among the outputs must be from 1 to the number of positions of the outputs, whose shape is "
            f"{tuple(logits.shape)}; received up to {most}. Return the number of frames that are no padding."
        )
    return Padding(lengths.to(logits.device), tuple(sizes))


def padding_of_rows(valid: Tensor) -> Padding:
    """Return the padding of a mask (N, positions), true for positions that count."""
    return Padding(valid.sum(1), (valid.shape[1],), valid)


def _found(arguments: Mapping[str, Any]) -> Iterator[Padding]:
    """Yield what each argument says, masks first: they are exact."""
    inputs = [value for name, value in arguments.items() if _is_input(name, value)]
    if not inputs:
        return
    rows, device = len(inputs[0]), inputs[0].device
    inputs = [one for one in inputs if len(one) == rows]

    def read(make: Callable[[], Padding]) -> Padding:
        try:
            return make()
        except SpecError as error:
            return Padding(torch.zeros(rows, dtype=torch.long, device=device), refusal=str(error))

    for name, value in arguments.items():
        # Masks with more axes are patterns of attention.
        if isinstance(value, Tensor) and value.ndim == 2 and len(value) == rows and names_padding([name]):
            yield read(partial(_from_mask, value.to(device), name))
    for name, value in arguments.items():
        lengths = value
        if isinstance(value, (list, tuple)) and value and all(isinstance(one, (int, float)) for one in value):
            lengths = torch.tensor(value)
        if _is_lengths(name) and isinstance(lengths, Tensor) and lengths.ndim:
            yield read(partial(_from_lengths, lengths.to(device), name, inputs))


def _counts_of(lengths: Tensor, outputs: Tensor) -> bool:
    """Return whether a tensor surely holds the lengths of outputs (N, positions), not (N, classes)."""
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape != outputs.shape[:1]:
        return False
    return bool((lengths >= 1).all()) and int(lengths.max()) == outputs.shape[1]


def _of_decoder(arguments: Mapping[str, Any]) -> Padding | None:
    mask, labels = arguments.get("decoder_attention_mask"), arguments.get("labels")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return _from_mask(mask, "decoder_attention_mask")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return padding_of_rows(labels != -100)
    return None


def _is_lengths(name: str) -> bool:
    return bool(_LENGTHS.search(name)) and not _NO_LENGTHS.search(name)


def _is_input(name: str, value: Any) -> bool:
    """Whether an argument is an input with positions."""
    return isinstance(value, Tensor) and value.ndim > 1 and not names_padding([name]) and name != "labels"


def _from_lengths(lengths: Tensor, name: str, inputs: Sequence[Tensor]) -> Padding:
    lengths = _checked(lengths, len(inputs[0]), repr(name))
    sizes = list(dict.fromkeys(size for one in inputs for size in one.shape[1:]))
    if lengths.is_floating_point():
        for size in sizes:
            counted = lengths * size
            if bool(((counted - counted.round()).abs() < _EXACT * size**0.5).all()) and counted.round().min() >= 1:
                return Padding(counted.round().long(), (size,))
        return Padding(lengths)
    most = int(lengths.max())
    fitting = [size for size in sizes if size == most] or [size for size in sizes if size > most]
    if not fitting:
        raise SpecError(
            f"{name!r} must be from 1 to the number of positions of the inputs, whose shapes are "
            f"{[tuple(one.shape) for one in inputs]}; received up to {most}. Give the number of positions of each "
            "example that are no padding."
        )
    return Padding(lengths, tuple(fitting))


def _checked(lengths: Tensor, rows: int, subject: str) -> Tensor:
    """Return lengths as integers, or as shares in (0, 1].

    Raises:
        SpecError: there is not one for each example, or one is no length.
    """
    if lengths.shape != (rows,):
        raise SpecError(
            f"{subject} must hold one length for each example; received shape {tuple(lengths.shape)} for {rows} "
            "examples. Give a tensor of shape (N,)."
        )
    low, high = float(lengths.min()), float(lengths.max())
    if lengths.is_floating_point() and low > 0 and high <= 1:
        return lengths
    if low < 1 or bool((lengths != lengths.round()).any() if lengths.is_floating_point() else False):
        raise SpecError(
            f"{subject} must be integers from 1 to the number of positions, or shares of it above 0 and up to 1; "
            f"received {low:g} to {high:g}. Give the number of positions of each example that are no padding."
        )
    return lengths.long()


def _from_mask(mask: Tensor, name: str) -> Padding:
    """Return the padding of a mask of booleans, of 0 and 1, or of 0 and negative numbers that are added to scores."""
    padding = "padding_mask" in name
    if mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all()):
        valid = mask.bool() ^ padding
    elif bool((mask <= 0).all()):
        valid = mask == 0
    else:
        raise SpecError(
            f"{name!r} must hold booleans, 0 and 1, or 0 and negative numbers; received {float(mask.min()):g} to "
            f"{float(mask.max()):g}. Give true for {'padding' if padding else 'positions that count'}."
        )
    counts = valid.sum(1)
    if not bool(counts.all()):
        raise SpecError(
            f"{name!r} must leave each example a position that is no padding; that of example "
            f"{int((counts == 0).nonzero()[0])} leaves none. Give true for "
            f"{'padding' if padding else 'positions that count'}."
        )
    if name == "mask" and not bool(valid[:, 0].any()):
        raise SpecError(
            "'mask' must be true for positions that count; received one whose first position is false in every "
            "example. Call it padding_mask if true means padding, attention_mask if examples are padded at the left."
        )
    return Padding(counts, (valid.shape[1],), valid)


def _within(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[:, None]
