"""Merging of checkpoints: a source and models adapted from it, tensor by tensor, from files to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import SourceError, SpecError, counted, hint
from conservtl.layers import check_globs, select
from conservtl.source.read import SourceLike
from conservtl.weights.alignment import aligned, check_quantised, is_quantised, without_wrapper
from conservtl.weights.checkpoints import open_checkpoint
from conservtl.weights.interpolation import Statistics, check_same_labels, check_statistics, mixes, share
from conservtl.weights.merge_rules import RULES, Rule
from conservtl.weights.merged_files import check_target, write_merged

__all__ = ["Merged", "merge"]


@dataclass(frozen=True)
class Merged:
    """Report of a merge.

    Args:
        path: the file or folder that was written.
        mixed: number of tensors that were mixed.
        taken: names of the tensors that are the first model's: integers, and those in ``fresh``.
        notes: the entries that were taken of checkpoints with several.
    """

    path: Path
    mixed: int
    taken: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.taken[:4]) + (", …" if len(self.taken) > 4 else "")
        rest = f"; {len(self.taken)} are the first model's: {shown}" if self.taken else ""
        return "\n".join([f"{self.path}: {counted(self.mixed, 'tensor')} mixed{rest}", *self.notes])


def merge(
    source: SourceLike,
    models: SourceLike | Sequence[SourceLike],
    out: str | Path,
    *,
    t: float | None = None,
    method: str = "interpolate",
    density: float = 0.2,
    batch_norm: Statistics = "interpolate",
    fresh: str | Sequence[str] = (),
    key: str | None = None,
    overwrite: bool = False,
) -> Merged:
    r"""Mix checkpoints of one architecture into a new one, with one tensor of each in memory at a time.

    With the source :math:`w^0` and models :math:`w^1 \dots w^n` adapted from it:

    - ``interpolate``, ``wise_ft``: :math:`(1 - t)\, w^0 + t\, \bar w`, with the mean of the models.
    - ``soup``: :math:`\bar w`.
    - ``model_stock``: interpolate, for each tensor with :math:`t = n c / (1 + (n - 1) c)`, c the mean cosine of the
      angles between the changes :math:`w^i - w^0`, at least 0.
    - ``task_arithmetic``: :math:`w^0 + t \sum_i (w^i - w^0)`.
    - ``ties``: the changes keep the share ``density`` of their largest values in each tensor; t times the mean of those
      that have the sign of their sum is added to the source.

    The result has the first model's names, types, files and metadata. A prefix of a wrapper (``module.``) or a
    trainer (``model.``, but in a folder, whose configuration goes with its names) is removed if the source has none.
    Integers (counts of batches, positions) are the first model's too, whatever the method; weights of 8 bits must be
    equal. A tensor that two names share in one checkpoint may have one of the names in another. Files of torch are read
    without executing code; the result is always safetensors. A folder gets the first model's configuration and
    tokenizer.

    Args:
        source: w0: a file, a folder with shards too, a name as ``adapt`` takes it, a state dict or a model.
        models: adapted from it: one, or a list.
        out: a new file ``*.safetensors``, or a folder.
        t: how far to go from the source; 0 to 1, for ``task_arithmetic`` and ``ties`` to 2. ``soup`` and
            ``model_stock`` choose it.
        method: one of those above.
        density: for ``ties``: share of each tensor's values to keep.
        batch_norm: running means and variances: mixed like weights, or those of the first model or the source.
        fresh: globs, or one glob, of tensors that are the first model's, such as a head that the source does not have.
        key: the entry to take of each checkpoint that has it, such as ``"ema"``; without it, as ``adapt`` chooses.
        overwrite: whether an earlier result may be replaced.

    Raises:
        SpecError: an argument is wrong, or ``out`` exists.
        SourceError: a checkpoint cannot be read; names or shapes differ; integers or floats of 8 bits that look
            like quantised weights differ; or a mixture is not finite.
        WriteError: the disk is full, or ``out`` cannot be written to.

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3, and "Model soups", section 2. Jang,
        Yun and Han 2024, "Model Stock: All we need is just a few fine-tuned models", section 4. Ilharco et al. 2023,
        "Editing models with task arithmetic", section 2. Yadav et al. 2023, "TIES-Merging", section 4, there with the
        largest values of all tensors together.

    Example:
        >>> import tempfile, torch, conservtl as ctl
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     one, other = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        ...     _ = ctl.merge(one, other, f"{folder}/half.safetensors", t=0.5)
        ...     ctl.interpolate(f"{folder}/half.safetensors", other, 0)["w"].tolist()
        [0.5, 0.5]
    """
    listed = list(models) if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    if not isinstance(out, (str, Path)):
        raise SpecError(f"out must be the path of a file *.safetensors or a folder; received {out!r:.60}.")
    check_globs("fresh", fresh, text=True)
    fresh = (fresh,) if isinstance(fresh, str) else fresh
    rule, t = _checked(method, t, len(listed), density, batch_norm)
    target = Path(out)
    check_target(target, [source, *listed], overwrite=overwrite)
    with ExitStack() as files:
        start, first, *others = (files.enter_context(open_checkpoint(one, key)) for one in (source, *listed))
        notes = [f"{one.where}: {note}" for one in (start, first, *others) for note in one.notes]
        if key is not None and not any(f"took the entry {key!r}" in one.notes for one in (start, first, *others)):
            raise SourceError(
                f"key must name an entry of a checkpoint; received {key!r}, which none has. Leave it out."
            )
        for other in (start, *others):
            check_same_labels(other, first)
        first = without_wrapper(first, start)
        ends = [first, *(aligned(other, first, fresh=()) for other in others)]
        excluded = {
            name
            for names in select(fresh, [*first.entries, *start.matched(first.entries).entries], "tensor").values()
            for name in names
        }
        start = aligned(start, first, fresh=excluded)
        taken: list[str] = []

        def mixed(name: str) -> Tensor:
            end = first.read(name)
            if name in excluded or is_quantised(end) or not mixes(end):
                if name not in excluded:
                    check_quantised(name, end, [start, *ends])
                taken.append(name)
                return end
            tensors = [start.read(name).to(end.device), *(one.read(name) for one in ends)]
            if (at := share(name, t, batch_norm)) != t:
                return tensors[0].to(end.dtype) if at == 0 else end
            result = rule.mix(tensors[0], tensors[1:], t, density).reshape(end.shape)
            _check_finite(name, result, tensors)
            return result

        described: dict[str, object] = {
            "method": method,
            "source": start.where.removeprefix("source "),
            "models": [one.where.removeprefix("source ") for one in ends],
        }
        described |= {} if rule.fixed else {"t": t}
        described |= {"density": density} if method == "ties" else {}
        with torch.no_grad():
            write_merged(target, first, mixed, json.dumps(described))
    return Merged(target, len(first.entries) - len(taken), tuple(sorted(taken)), tuple(notes))


def _checked(method: str, t: float | None, count: int, density: float, batch_norm: str) -> tuple[Rule, float]:
    """Return the rule and its t."""
    if not isinstance(method, str) or method not in RULES:
        near = hint(str(method), list(RULES))
        raise SpecError(f"method must be one of {', '.join(RULES)}; received {method!r:.60}.{near}")
    rule = RULES[method]
    if count < rule.least:
        raise SpecError(
            f"{method} needs {'a model' if rule.least == 1 else f'at least {rule.least} models'} beside the source; "
            f"received {count}."
        )
    if rule.fixed and t is not None:
        raise SpecError(f"t: {method} chooses it; received {t}. Leave t out, or use method interpolate.")
    if (t := rule.t if t is None else t) is None:
        raise SpecError(f"t must say how far {method} goes from the source, 0 to {rule.high:g}. Give t, such as 0.5.")
    if not _is_number(t) or not 0 <= t <= rule.high:
        raise SpecError(f"t must be between 0 (the source) and {rule.high:g} for {method}; received {t!r:.60}.")
    if not _is_number(density) or not 0 < density <= 1:
        raise SpecError(f"density must be above 0 and at most 1; received {density!r:.60}.")
    check_statistics(batch_norm)
    return rule, float(t)


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, of NumPy or a tensor too, and neither True nor False."""
    return not isinstance(value, (bool, str)) and hasattr(value, "__float__")


def _check_finite(name: str, result: Tensor, tensors: Sequence[Tensor]) -> None:
    if torch.isfinite(result).all() or not all(torch.isfinite(one).all() for one in tensors):
        return
    raise SourceError(f"the mixture of {name!r} must fit into {result.dtype}; it overflows. Use a smaller t.")
