"""Hooks that record the outputs or inputs of modules in the forward passes of a whole model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.batches import tensors_of
from conservtl.compat import guard_hooks, hooks_are_guarded, in_backward, note_of, version_of
from conservtl.runtime.layer_features import all_tensors_of, tensor_of

__all__ = ["End", "Passes", "Start", "Tap"]

_PASSES = 4
"""Forward passes to remember until the first loss shows how many make a batch."""
_MOST_MODES = 16
"""Combinations of modules in training mode for which it is known where the model writes into outputs."""
_UNKNOWN = -1


@dataclass(eq=False)
class Passes:
    """Forward passes of the whole model since the last loss."""

    count: int = 0
    """Passes with gradients."""
    before: int = 0
    """Those before the last loss: they number the passes that outputs come from."""
    running: bool = False
    """Whether one is being made."""
    keep: int = _PASSES
    modes: int = _UNKNOWN
    """Number of the combination of modules in training mode."""

    def behind(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the numbers of the passes whose outputs these tensors were computed from."""
        found: set[int] = set()
        nodes = [tensor.grad_fn for tensor in tensors]
        seen = {None, *nodes}
        while nodes:
            if (node := nodes.pop()) is None:
                continue
            if (number := note_of(node).get(self)) is not None:
                found.add(number)
                continue
            after = {one for one, _ in node.next_functions} - seen
            seen |= after
            nodes.extend(after)
        return found


@dataclass
class Record:
    """What a tap saw in a forward pass."""

    number: int
    tensors: list[Tensor]
    """As they are, or copied."""
    modes: int
    watched: list[tuple[Tensor, int]]
    """The tensors themselves with their versions, which grow when something writes into them."""
    copied: bool

    @property
    def written(self) -> bool:
        """Whether something has written into the tensors since."""
        return any(version_of(tensor) != before for tensor, before in self.watched)


class Start:
    """Forward pre-hook of the whole model. A copy, in a copied model, does nothing."""

    def __init__(self, model: nn.Module, passes: Passes, taps: Iterable[Tap]) -> None:
        self.passes, self.taps, self.live = passes, list(taps), True
        self._modules = list(model.modules())[1:]  # the hook of a model must not hold the model
        self._modes: dict[tuple[bool, ...], int] = {}

    def __call__(self, model: nn.Module, *_: Any) -> None:
        """Count the pass, and note which modules are in training mode."""
        if self.live and torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                if in_backward():  # a checkpoint around the whole model computes it again
                    return
                if not hooks_are_guarded():
                    guard_hooks()  # the compiler was loaded after the taps were registered
                modes = (model.training, *map(_training, self._modules))
                if len(self._modes) < _MOST_MODES:
                    self._modes.setdefault(modes, len(self._modes))
                self.passes.modes = self._modes.get(modes, _UNKNOWN)
            self.passes.count += 1
            self.passes.running = True
            # One more of compiled passes, since only records tell which of them a loss comes from.
            keep = self.passes.keep + 1 if torch.compiler.is_compiling() else self.passes.keep
            first = self.passes.count - keep + 1
            for tap in self.taps:
                tap.records = [record for record in tap.records if record.number >= first]

    def __getstate__(self) -> dict[str, Any]:
        return {"passes": Passes(), "taps": [], "live": False, "_modules": [], "_modes": {}}


class End:
    """Forward hook of the whole model; runs after an error, too."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def __call__(self, _: nn.Module, __: Any, outputs: Any) -> None:
        """Note that no pass is being made, and which one the outputs come from."""
        if self.passes.running and not torch.compiler.is_compiling():
            for tensor in tensors_of(outputs):
                if tensor.grad_fn is not None:
                    note_of(tensor.grad_fn)[self.passes] = self.passes.before + self.passes.count
        self.passes.running = False

    def __getstate__(self) -> dict[str, Any]:
        return {"passes": Passes()}


class Tap:
    """Forward hook that records outputs, or pre-hook that records inputs, with the number of the forward pass.

    The next module may write into what is recorded, as ``ReLU(inplace=True)`` does. So the first pass copies it, and
    those after it do only if something wrote into it in a pass with the same modules in training mode.

    A copy, in a copied model, records nothing.
    """

    def __init__(self, layer: str, passes: Passes) -> None:
        self.layer, self.passes = layer, passes
        self.live = True
        self.records: list[Record] = []
        self.checkpointed = False
        self.written: dict[int, bool] = {}

    def output(self, module: nn.Module, _: Any, output: Any) -> None:
        """Record an output, as a forward hook."""
        if self._wanted():
            self._record(all_tensors_of(output, self.layer, module))

    def input(self, _: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Record an input, as a forward pre-hook."""
        if self._wanted():
            self._record([tensor_of(inputs or tuple(keywords.values()), self.layer)])

    def _wanted(self) -> bool:
        if not self.live:
            return False
        if torch.is_grad_enabled():  # what a checkpoint computes again is no further pass
            return torch.compiler.is_compiling() or not in_backward()
        if not self.passes.running or torch.compiler.is_compiling():
            return False
        # Without gradients inside a pass that has them: a part that the model does not train, or a checkpoint.
        self.checkpointed = self.checkpointed or _in_checkpoint()
        return not self.checkpointed

    def _record(self, tensors: list[Tensor]) -> None:
        number, modes, alone = self.passes.count, self.passes.modes, not self.passes.running
        if alone:
            self.records = []  # called by itself, outside the whole model: the last call counts
        if alone or modes == _UNKNOWN or torch.compiler.is_compiling() or any(map(torch.is_inference, tensors)):
            self.records.append(Record(number, [one.clone() for one in tensors], _UNKNOWN, [], copied=True))
            return
        copied = self.written.get(modes, True)
        watched = [] if self.written.get(modes) else [(one, version_of(one)) for one in tensors]
        # Views, so that gradients are summed in the order in which copies would have them: a resumed run equals its
        # uninterrupted one bit for bit, although it copies once more.
        kept = [one.clone() if copied else one.view_as(one) for one in tensors]
        self.records.append(Record(number, kept, modes, watched, copied=copied))

    def taken(self, first: int) -> tuple[list[Tensor], bool]:
        """Return the tensors recorded since a pass, once, and whether one that was not copied was written into."""
        records, self.records = [record for record in self.records if record.number >= first], []
        lost = False
        for record in records:
            if record.watched:
                written = record.written
                self.written[record.modes] = self.written.get(record.modes, False) or written
                lost |= written and not record.copied
        return [tensor for record in records for tensor in record.tensors], lost

    def note_passes(self) -> None:
        """Note which pass each record comes from: the hook at a model's end cannot where the pass is compiled."""
        for record in self.records:
            for tensor in record.tensors:
                if tensor.grad_fn is not None:
                    note_of(tensor.grad_fn).setdefault(self.passes, self.passes.before + record.number)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"layer": self.layer, "passes": Passes(), "written": {}}
        return {**kept, "live": False, "records": [], "checkpointed": False}


def _in_checkpoint() -> bool:
    """Whether a reentrant checkpoint is running: torch's, or a library's of the same name."""
    frame = inspect.currentframe()
    while frame is not None:
        if "CheckpointFunction" in frame.f_code.co_qualname:
            return True
        frame = frame.f_back
    return False


_training = attrgetter("training")
