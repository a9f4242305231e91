"""Padding as the arguments of a model, a batch or outputs say it.

Padding is found by name among the arguments of a model or the entries of a batch:

- ``lengths``, ``input_lengths``, ``wav_lens`` and the like: (N,), integers from 1 to the number of positions, or shares
  of it above 0 and up to 1;
- ``attention_mask``, ``mask``, ``input_mask`` and the like: (N, positions), true or 1 for positions that count;
- ``padding_mask``, ``key_padding_mask`` and the like: (N, positions), true for padding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import SpecError, counted
from conservtl.padding.positions import Padding, ends

__all__ = ["completed", "find_padding", "names_padding", "padding_of_outputs", "padding_of_rows"]

_LENGTHS = re.compile(r"(^|_)(lengths?|lens?|num_frames)$")
_NO_LENGTHS = re.compile(r"label|target|tgt|token|decoder|max|min")
_MASKS = re.compile(r"^((input|inputs|feature|features|frame|frames|valid|sequence|encoder)_)?(attention_)?mask$")
_PADDING = re.compile(r"^(?!.*(decoder|tgt|target|memory)).*padding_mask$")
_OF_OUTPUTS = ("lengths", "output_lengths", "out_lengths", "logit_lengths", "logits_lengths", "mask", "attention_mask")
_EXACT = 1e-3  # largest distance of a share times the number of positions from an integer


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


def completed(padding: Padding | None, batch: Any) -> Padding | None:
    """Return the padding of a forward pass, with what a dictionary of a batch says where its arguments do not.

    A decoder's padding may stand in labels that the model did not get.
    """
    if not isinstance(batch, Mapping):
        return padding
    if padding is None:
        return find_padding(batch)
    if padding.has_decoder and padding.decoder is None:
        return replace(padding, decoder=_of_decoder(batch))
    return padding


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
    lengths, most = _checked(said, len(logits), "the lengths among the outputs")
    if lengths.is_floating_point():
        return Padding(lengths)
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
    lengths, most = _checked(lengths, len(inputs[0]), repr(name))
    sizes = list(dict.fromkeys(size for one in inputs for size in one.shape[1:]))
    if lengths.is_floating_point():
        numbers = {size: lengths * size for size in sizes}
        exact = [
            size
            for size, number in numbers.items()
            if bool(((number - number.round()).abs() < _EXACT * size**0.5).all()) and number.round().min() >= 1
        ]
        if len(exact) == 1:
            return Padding(numbers[exact[0]].round().long(), (exact[0],))
        return Padding(lengths, tuple(exact) or None)  # shares of one of several axes: a tensor's own tell which
    fitting = [size for size in sizes if size == most] or [size for size in sizes if size > most]
    if not fitting:
        raise SpecError(
            f"{name!r} must be from 1 to the number of positions of the inputs, whose shapes are "
            f"{[tuple(one.shape) for one in inputs]}; received up to {most}. Give the number of positions of each "
            "example that are no padding."
        )
    return Padding(lengths, tuple(fitting))


def _checked(lengths: Tensor, rows: int, subject: str) -> tuple[Tensor, float]:
    """Return lengths as integers, or as shares in (0, 1], and the largest."""
    if lengths.shape != (rows,):
        raise SpecError(
            f"{subject} must hold one length for each example; received shape {tuple(lengths.shape)} for "
            f"{counted(rows, 'example')}. Give a tensor of shape (N,)."
        )
    low, high = ends(lengths)
    if lengths.is_floating_point() and low > 0 and high <= 1:
        return lengths, high
    if low < 1 or bool((lengths != lengths.round()).any() if lengths.is_floating_point() else False):
        raise SpecError(
            f"{subject} must be integers from 1 to the number of positions, or shares of it above 0 and up to 1; "
            f"received {low:g} to {high:g}. Give the number of positions of each example that are no padding."
        )
    return lengths.long(), int(high)


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
