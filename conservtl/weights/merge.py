"""Merging of checkpoints: a source and models adapted from it, tensor by tensor, from files to files."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from conservtl.errors import SourceError, SpecError, hint
from conservtl.layers import select
from conservtl.source.read import SourceLike
from conservtl.storage.files import write_text
from conservtl.storage.folders import atomic_folder, check_replaceable
from conservtl.storage.tensor_writer import Entry, write_tensors
from conservtl.weights.checkpoints import Checkpoint, open_checkpoint
from conservtl.weights.interpolation import Statistics, check_same_labels, mixes, share
from conservtl.weights.merge_rules import RULES, Rule

__all__ = ["Merged", "merge"]

_COPIED = ("*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "vocab*", "merges.txt", "LICENSE*", "*.py")
_LEFT = ("*.index.json", "trainer_state.json", "*_results.json", "adapter_config.json", "report.json")
_KNOWN = (*_COPIED, "*.safetensors")


@dataclass(frozen=True)
class Merged:
    """Report of a merge.

    Args:
        path: the file or folder that was written.
        mixed: number of tensors that were mixed.
        taken: names of the tensors that are the first model's: integers, and those in ``fresh``.
    """

    path: Path
    mixed: int
    taken: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.taken[:4]) + (", …" if len(self.taken) > 4 else "")
        rest = f"; {len(self.taken)} are the first model's: {shown}" if self.taken else ""
        return f"{self.path}: {self.mixed} tensors mixed{rest}"


def merge(
    source: SourceLike,
    models: SourceLike | Sequence[SourceLike],
    out: str | Path,
    *,
    t: float | None = None,
    method: str = "interpolate",
    density: float = 0.2,
    batch_norm: Statistics = "interpolate",
    fresh: Sequence[str] = (),
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

    The result has the first model's names (without ``module.`` of a wrapper), types, files and metadata. Integers
    (counts of batches, positions) are the first model's too, whatever the method. A tensor that two names share in one
    checkpoint may have one of the names in another. Files of torch are read without executing code; the result is
    always safetensors. A folder gets the first model's configuration and tokenizer.

    Args:
        source: w0: a file, a folder with shards too, a name as ``adapt`` takes it, a state dict or a model.
        models: adapted from it: one, or a list.
        out: a new file ``*.safetensors``, or a folder.
        t: how far to go from the source; 0 to 1, for ``task_arithmetic`` and ``ties`` to 2. ``soup`` and
            ``model_stock`` choose it.
        method: one of those above.
        density: for ``ties``: share of each tensor's values to keep.
        batch_norm: running means and variances: mixed like weights, or those of the first model or the source.
        fresh: globs of tensors that are the first model's, such as a head that the source does not have.
        overwrite: whether an earlier result may be replaced.

    Raises:
        SpecError: an argument is wrong, or ``out`` exists.
        SourceError: a checkpoint cannot be read; names or shapes differ; integers that look like quantised weights
            differ; or a mixture is not finite.
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
    rule, t = _checked(method, t, len(listed), density, batch_norm)
    target = Path(out)
    _check_target(target, [source, *listed], overwrite=overwrite)
    with ExitStack() as files:
        start, first, *others = (files.enter_context(open_checkpoint(one)) for one in (source, *listed))
        for other in (start, *others):
            check_same_labels(other, first)
        first = _without_wrapper(first, start)
        ends = [first, *(_aligned(other, first, fresh=()) for other in others)]
        excluded = {
            name
            for names in select(fresh, [*first.entries, *start.matched(first.entries).entries], "tensor").values()
            for name in names
        }
        start = _aligned(start, first, fresh=excluded)
        taken: list[str] = []

        def mixed(name: str) -> Tensor:
            end = first.read(name)
            if name in excluded or not mixes(end):
                _check_integers(name, end, [start, *ends])
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
            _write(target, first, mixed, json.dumps(described))
    return Merged(target, len(first.entries) - len(taken), tuple(sorted(taken)))


def _checked(method: str, t: float | None, count: int, density: float, batch_norm: str) -> tuple[Rule, float]:
    """Return the rule and its t.

    Raises:
        SpecError: an argument is wrong.
    """
    if method not in RULES:
        raise SpecError(f"method must be one of {', '.join(RULES)}; received {method!r}.{hint(method, list(RULES))}")
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
    if isinstance(t, bool) or not 0 <= t <= rule.high:
        raise SpecError(f"t must be between 0 (the source) and {rule.high:g} for {method}; received {t}.")
    if not 0 < density <= 1:
        raise SpecError(f"density must be above 0 and at most 1; received {density}.")
    if batch_norm not in get_args(Statistics):
        raise SpecError(f"batch_norm must be one of {get_args(Statistics)}; received {batch_norm!r}.")
    return rule, float(t)


def _check_target(target: Path, inputs: Sequence[SourceLike], *, overwrite: bool) -> None:
    paths = [Path(one) for one in inputs if isinstance(one, str | Path)]
    if target.exists() and any(path.exists() and target.samefile(path) for path in paths):
        raise SpecError(f"out must be none of the checkpoints to merge; received {str(target)!r}. Give another name.")
    if target.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise SpecError(f"out must be a folder or end in .safetensors; received {str(target)!r}.")
    if target.suffix != ".safetensors":
        check_replaceable(target, _KNOWN, overwrite=overwrite)
    elif target.exists() and not (overwrite and target.is_file()):
        raise SpecError(f"{str(target)!r} exists. Give another name, or ask for it to be overwritten (--overwrite).")


def _without_wrapper(first: Checkpoint, start: Checkpoint) -> Checkpoint:
    """Return the first model without the prefix of DataParallel and its like, if the source does not have it."""
    prefix = "module."
    wrapped = all(name.startswith(prefix) for name in first.entries)
    if not wrapped or any(name.startswith(prefix) for name in start.entries):
        return first
    return first.renamed({name.removeprefix(prefix): name for name in first.entries})


def _aligned(other: Checkpoint, first: Checkpoint, fresh: set[str] | tuple[()]) -> Checkpoint:
    """Return a checkpoint under the first model's names, with its shapes.

    Raises:
        SourceError: a tensor is missing, left over or of another shape.
    """
    other = other.matched(first.entries)
    names = {name: name for name in first.entries if name in other.entries}
    for name in first.entries:
        if name not in names and name not in fresh:
            names[name] = _partner(name, first, other) or name
    missing = [name for name in names if names[name] not in other.entries]
    left = [
        name
        for name in other.entries
        if name not in first.entries and name not in fresh and _partner(name, other, first) is None
    ]
    for found, owner, lacks in ((missing, first, other), (left, other, first)):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise SourceError(
                f"all checkpoints must have each tensor; {found[0]!r}{more} of {owner.where} is not in {lacks.where}. "
                f"Merge models of one structure, or keep the first model's: fresh=[{found[0]!r}] (--fresh)."
            )
    for name, old in names.items():
        shapes = first.entries[name].shape, other.entries[old].shape
        if name not in fresh and shapes[0] != shapes[1]:
            raise SourceError(
                f"all checkpoints must have one shape for each tensor; {name!r} has {shapes[0]} in {first.where} and "
                f"{shapes[1]} in {other.where}. Keep the first model's: fresh=[{name!r}] (--fresh)."
            )
    return other.renamed({name: old for name, old in names.items() if old in other.entries})


def _partner(name: str, owner: Checkpoint, other: Checkpoint) -> str | None:
    """Return a name in ``other`` of a tensor that ``owner`` ties with this one, or holds twice; None without."""
    entry = owner.entries[name]
    shared = [one for one in owner.entries if one != name and one in other.entries and owner.entries[one] == entry]
    place = owner.memory.get(name)
    if place is not None and (tied := [one for one in shared if owner.memory.get(one) == place]):
        return tied[0]
    if math.prod(entry.shape) <= 1:  # counters are equal by chance
        return None
    value = owner.read(name) if shared else None
    return next((one for one in shared if value is not None and torch.equal(owner.read(one), value)), None)


def _check_integers(name: str, first: Tensor, checkpoints: Sequence[Checkpoint]) -> None:
    """Raise if integers of two dimensions differ, which are quantised weights and have no mean."""
    if mixes(first) or first.ndim < 2:
        return
    for other in checkpoints:
        if name in other.entries and not torch.equal(other.read(name), first):
            raise SourceError(
                f"weights must be floating-point numbers; {name!r} holds {first.dtype} and differs between the "
                "checkpoints, as quantised weights do. Merge the weights from before quantisation."
            )


def _check_finite(name: str, result: Tensor, tensors: Sequence[Tensor]) -> None:
    if torch.isfinite(result).all() or not all(torch.isfinite(one).all() for one in tensors):
        return
    raise SourceError(f"the mixture of {name!r} must fit into {result.dtype}; it overflows. Use a smaller t.")


def _write(target: Path, first: Checkpoint, mixed: Callable[[str], Tensor], described: str) -> None:
    read: Mapping[str, Entry] = first.entries
    parts: dict[str, dict[str, Entry]] = {}
    for name, entry in read.items():
        parts.setdefault(_file_name(first.files.get(name, "")), {})[name] = entry

    def write(path: Path, entries: Mapping[str, Entry], file: str) -> None:
        kept = next((texts for name, texts in first.metadata.items() if _file_name(name) == file), {})
        write_tensors(path, entries, mixed, {"format": "pt", **kept, "merge": described})

    if target.suffix == ".safetensors":
        write(target, read, next(iter(parts)) if len(parts) == 1 else "")
        return
    with atomic_folder(target) as folder:
        if first.index is None:
            write(folder / "model.safetensors", read, next(iter(parts)))
        else:
            for file, entries in parts.items():
                write(folder / file, entries, file)
            weight_map = {name: file for file, entries in sorted(parts.items()) for name in entries}
            index = {
                "metadata": {"total_size": sum(entry.size for entry in read.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            name = re.sub(r"^pytorch_model\.bin", "model.safetensors", first.index)
            write_text(json.dumps(index, indent=2) + "\n", folder / name)
        if first.folder is not None:
            _copy_files(first.folder, folder)


def _file_name(file: str) -> str:
    """Return the name of a file of safetensors for one that may be of torch."""
    stem = re.sub(r"\.(bin|pt|pth|th|ckpt)$", "", file)
    if stem == file:
        return file or "model.safetensors"
    return re.sub(r"^pytorch_model", "model", stem) + ".safetensors"


def _copy_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, licence and code of the model, and the folders of sentence encoders' modules."""
    folders = [path for path in source.iterdir() if path.is_dir() and re.fullmatch(r"\d+_\w+", path.name)]
    for path in [*source.iterdir(), *(inner for folder in folders for inner in folder.iterdir())]:
        wanted = any(fnmatchcase(path.name, glob) for glob in _COPIED)
        if not path.is_file() or not wanted or any(fnmatchcase(path.name, glob) for glob in _LEFT):
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
