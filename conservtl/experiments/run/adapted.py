"""An adapted model that predicts: files in batches of similar length, read one batch ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from conservtl.batches import map_tensors
from conservtl.data import Preprocessing
from conservtl.errors import DataError, SpecError, counted
from conservtl.functions import logits_of
from conservtl.tasks.bad_files import OnBad, check_files
from conservtl.tasks.base import Prediction, Task

__all__ = ["Adapted", "batches_by_length", "durations", "read_ahead", "speed_text"]

_WINDOW = 8  # batches whose files are sorted by length together

Content = TypeVar("Content")
_SECONDS = 20.0  # of a batch at most, its padding included, for each of the files that it may have


@dataclass(frozen=True)
class Adapted:
    """An adapted model that predicts.

    Args:
        model: in eval mode.
        labels: names of the model's outputs, in order.
        preprocessing: makes inputs of files.
        task: the task that it was adapted for.
    """

    model: nn.Module
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    task: Task

    @torch.no_grad()
    def outputs(self, inputs: Any) -> Any:
        """Return the model's outputs.

        Args:
            inputs: as the model takes them: a tensor, or a dictionary of its arguments.
        """
        device = next(self.model.parameters()).device
        placed = map_tensors(inputs, lambda tensor: tensor.to(device))
        return self.task.answer(self.model, placed if isinstance(placed, Mapping) else (placed,))

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Return (N, labels), each row summing to 1, for inputs as the model takes them; for tasks with classes."""
        return logits_of(self.outputs(inputs)).float().softmax(-1)

    def predict(
        self,
        files: str | Path | Sequence[str | Path],
        batch_size: int = 32,
        *,
        on_bad: OnBad = "error",
        skipped: MutableMapping[str, str] | None = None,
    ) -> list[Prediction]:
        """Return the answer for each file, or for one: its most probable label where the task has classes.

        ``predictions`` yields the same one by one.

        Args:
            files: paths.
            batch_size: files that are read and predicted at a time, which bounds the memory.
            on_bad: whether a file that cannot be used is an error or skipped.
            skipped: gets the names of skipped files, and why.

        Raises:
            DataError: a file is missing or cannot be read; the message names it.
            SpecError: the batch size is below 1.
        """
        return list(self.predictions(files, batch_size, on_bad=on_bad, skipped=skipped))

    def predictions(
        self,
        files: str | Path | Sequence[str | Path],
        batch_size: int = 32,
        *,
        on_bad: OnBad = "error",
        skipped: MutableMapping[str, str] | None = None,
    ) -> Iterator[Prediction]:
        """Return an iterator over the answers of ``predict``, which has the same arguments, in the order of the files.

        Files are read when it gets there, one batch ahead. Those that have a duration are batched with others of
        similar length; fewer than ``batch_size`` at a time where they are long.
        """
        paths = _paths(files)
        if batch_size < 1:
            raise SpecError(f"predict: batch_size must be at least 1; received {batch_size}.")
        if on_bad not in get_args(OnBad):
            raise SpecError(f"predict: on_bad must be 'error' or 'skip'; received {on_bad!r}.")
        missing = [path for path in paths if not path.is_file()]
        if missing and on_bad == "error":
            raise DataError(f"{str(missing[0])!r} is not a file. Give paths of files to predict.")
        bad: MutableMapping[str, str] = {} if skipped is None else skipped
        bad.update((str(path), "is not a file") for path in missing)
        paths = [path for path in paths if str(path) not in bad]
        return self._in_order(paths, batch_size, bad if on_bad == "skip" else None)

    def _in_order(
        self, paths: Sequence[Path], batch_size: int, skipped: MutableMapping[str, str] | None
    ) -> Iterator[Prediction]:
        """Predict window by window: in a window by length, out of it in the order given."""
        size = batch_size * (_WINDOW if hasattr(self.preprocessing, "seconds") else 1)
        longest = getattr(self.preprocessing, "longest", math.inf)
        with ThreadPoolExecutor(1) as reader:
            for start in range(0, len(paths), size):
                window = paths[start : start + size]
                seconds = durations(self.preprocessing, window) or [0.0] * len(window)
                long = [place for place, each in enumerate(seconds) if each > longest]
                short = [place for place in range(len(window)) if place not in long]
                by_length = batches_by_length([seconds[place] for place in short], batch_size)
                batches = [[short[number] for number in batch] for batch in by_length]
                reads = [partial(self._read, [window[place] for place in batch], skipped) for batch in batches]
                found: dict[int, Prediction] = {}
                for batch, (inputs, kept) in zip(batches, read_ahead(reader, reads), strict=True):
                    places = [batch[number] for number in kept]
                    answers = self._answers(inputs, [window[place] for place in places])
                    found.update(zip(places, answers, strict=True))
                found |= self._from_windows({place: window[place] for place in long}, skipped)
                yield from (found[place] for place in sorted(found))

    def _read(self, files: Sequence[Path], skipped: MutableMapping[str, str] | None) -> tuple[Any, list[int]]:
        """Return the inputs of files, and the positions of those that can be used."""
        try:
            return self.preprocessing.read(files), list(range(len(files)))
        except DataError:
            if skipped is None:
                raise
            bad = check_files(files, lambda file: self.preprocessing.read([file]))
            if not bad:  # not one file's fault
                raise
        skipped.update((str(file), reason) for file, reason in bad.items())
        kept = [place for place, file in enumerate(files) if file not in bad]
        return (self.preprocessing.read([files[place] for place in kept]) if kept else None), kept

    def _from_windows(
        self, files: Mapping[int, Path], skipped: MutableMapping[str, str] | None
    ) -> dict[int, Prediction]:
        """Return the answers for files, by place, that are too long for one forward pass, from one for each window."""
        preprocessing: Any = self.preprocessing  # has ``windows``, where it has a ``longest``, and the task ``joined``
        task: Any = self.task
        found = {}
        for place, file in files.items():
            outputs, spans = [], []
            try:
                for span, inputs in preprocessing.windows(file):
                    outputs.append(map_tensors(self.outputs(inputs), lambda tensor: tensor.cpu()))
                    spans.append(span)
            except DataError as error:
                if skipped is None:
                    raise
                skipped[str(file)] = str(error)
                continue
            found[place] = task.joined(outputs, spans, self.labels, file)
        return found

    def _answers(self, inputs: Any, files: Sequence[Path]) -> list[Prediction]:
        if not files:
            return []
        outputs = map_tensors(self.outputs(inputs), lambda tensor: tensor.cpu())
        return self.task.predictions(outputs, self.labels, files)


def _paths(files: Any) -> list[Path]:
    given = [files] if isinstance(files, (str, Path)) else files
    if isinstance(given, Sequence) and all(isinstance(file, (str, Path)) for file in given):
        return [Path(file) for file in given]
    kind = type(files).__name__
    raise SpecError(
        f"predict: files must be paths, or one path; received {kind}. For inputs as the model takes them call "
        "outputs(inputs) or probabilities(inputs)."
    )


def durations(preprocessing: Any, files: Sequence[Path]) -> list[float] | None:
    """Return the duration of each file in seconds, 0 for one that cannot be read; None: files have no duration."""
    measure = getattr(preprocessing, "seconds", None)
    return None if measure is None else [_duration(measure, file) for file in files]


def batches_by_length(seconds: Sequence[float], most: int) -> list[list[int]]:
    """Return the positions of each batch, short files first; fewer of long ones, which bounds its padded duration."""
    batches: list[list[int]] = []
    for place in sorted(range(len(seconds)), key=lambda place: seconds[place]):
        full = not batches or len(batches[-1]) == most
        if full or (len(batches[-1]) + 1) * seconds[place] > most * _SECONDS:
            batches.append([])
        batches[-1].append(place)
    return batches


def read_ahead(executor: Executor, reads: Sequence[Callable[[], Content]]) -> Iterator[Content]:
    """Return an iterator over contents; the next one is read while its user works with the one before."""
    ahead = executor.submit(reads[0]) if reads else None
    for following in (*reads[1:], None):
        if ahead is None:
            return
        content = ahead.result()
        ahead = None if following is None else executor.submit(following)
        yield content


def speed_text(preprocessing: Any, files: Sequence[Path], elapsed: float) -> str:
    """Return how long files took beside their duration; empty where they have none."""
    total = sum(durations(preprocessing, files) or ())
    if not total:
        return ""
    return f"{counted(len(files), 'file')}, {total:,.1f} s, in {elapsed:,.1f} s: real-time factor {elapsed / total:.3g}"


def _duration(measure: Callable[[Path], float], file: Path) -> float:
    try:
        return measure(file)
    except DataError:  # reading it says why
        return 0.0
