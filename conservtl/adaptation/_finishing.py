"""Methods that end training: the plan's ``after`` decisions, and copies of the model: merged, plain, at its start."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation._base import AdaptationBase
from conservtl.batches import check_batches
from conservtl.compat import hook_tables, load_hook_tables
from conservtl.errors import SpecError
from conservtl.functions import Forward, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.kernels.dtensor import sharded
from conservtl.layers import canonical, named_parameters, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.layers.extended import extended_modules
from conservtl.layers.plain import replace_module
from conservtl.plan.decision import FinishContext, apply_extensions
from conservtl.runtime.freezing import thaw

__all__ = ["FinishingMethods"]

_PACKAGE = __name__.partition(".")[0]


def mean_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of a model on a batch."""
    return cross_entropy(plain_forward(model, batch), batch)


class FinishingMethods(AdaptationBase):
    """Methods of an adaptation that end training."""

    def finish(
        self,
        batches: Iterable[Any] | None = None,
        *,
        forward: Forward = plain_forward,
        score: Callable[[], float] | None = None,
        valid: Iterable[Any] | None = None,
        objective: Callable[[nn.Module, Any], Tensor] = mean_cross_entropy,
        margin: float = 0.0,
    ) -> dict[str, Any]:
        """Carry out the plan's ``after`` decisions at the end of training; ``fit`` does this by itself.

        Each is carried out once: a second call, or one after ``fit``, returns the facts of the first, unless steps
        were made since. If it is left out, a model that is saved, exported or deleted after training warns.

        Args:
            batches: batches of the training data, to recompute statistics on; iterated repeatedly.
            forward: (model, batch) -> outputs.
            score: () -> score of the model's current weights on a validation part; higher is better.
            valid: batches of the validation part; iterated repeatedly.
            objective: (model, batch of ``valid``) -> loss, a scalar.
            margin: largest difference of two scores that counts as chance, such as that of half an example.

        Returns:
            Name of each decision -> its facts for a report.

        Raises:
            SpecError: a decision needs a validation part, or batches, and there are none.
        """
        start = self.start if self.plan.after else {}
        for name, given in {"batches": batches, "valid": valid}.items():
            if given is not None and self.plan.after:
                check_batches(given, f"finish({name}=...)")
        self.bound.restore_weights()
        done = self.bound.endings.done
        for after in self.plan.after:
            if after.name in done:
                continue
            if type(after).scored and score is None and valid is None:
                raise SpecError(
                    f"{after.by} chooses on a validation part: pass score or valid, or give fit valid={{...}}."
                )
            context = FinishContext(unwrap(self.model), start, batches, forward, score, valid, objective, margin)
            with torch.no_grad():
                done[after.name] = after.finish(context)
        self.bound.endings.finished()
        self.bound.register_hooks()
        return dict(done)

    def merged(self) -> nn.Module:
        """Return a copy of the model in which added parameters are merged into the weights, if that is exact.

        Additions that cannot be merged stay. Without additions it is a plain copy.
        """
        self.bound.endings.exported()
        self.bound.restore_weights()
        model = deep_copy(unwrap(self.model))
        for strategy in sorted(self.origin.strategies, key=lambda strategy: not strategy.merges_first):
            strategy.merge(model)
        return model

    @torch.no_grad()
    def at_start(self) -> nn.Module:
        """Return a copy of the model with its starting values and statistics, in eval mode: the source as it is.

        Additions of strategies have their first values, with which they change nothing. Fresh parameters have no
        starting values of the source's, and are copied as they are now.

        Raises:
            SpecError: parameters are sharded over processes.

        Example:
            >>> import torch, conservtl as ctl
            >>> adaptation = ctl.adapt(torch.nn.Linear(2, 2), source := torch.nn.Linear(2, 2), [ctl.L2SP()])
            >>> _ = torch.nn.init.zeros_(adaptation.model.weight)  # instead of training
            >>> torch.equal(adaptation.at_start().weight, source.weight)
            True
        """
        parameters = self.bound.parameters()
        if cut := next((name for name, parameter in parameters.items() if sharded(parameter)), None):
            raise SpecError(
                f"at_start copies whole weights; {cut!r} is sharded over processes. Evaluate before you shard the "
                "model, or export the trained weights and evaluate them in one process."
            )
        self.bound.restore_weights()
        model: nn.Module = deep_copy(unwrap(self.model))
        apply_extensions(model, self.origin.extensions, self.layers)
        anchors = self.bound.anchors
        start = {**anchors.buffers, **anchors.added, **anchors.start(self.model, self.plan)}
        buffers = {canonical(name): buffer for name, buffer in model.named_buffers()}
        for name, tensor in {**named_parameters(model), **buffers}.items():
            if name in start and start[name].shape == tensor.shape:
                tensor.copy_(start[name])
        return model.eval()

    @torch.no_grad()
    def export(self) -> nn.Module:
        """Return a plain copy of the model in eval mode, which needs torch and your own code only.

        Added parameters are merged as by ``merged``; what cannot be merged (amplitudes of recurrent layers, a transform
        of the input, statistics of each example) becomes a ``torch.fx.GraphModule`` in its place. An adapter of PEFT is
        merged and unloaded. Hooks, held norms and what else belongs to training is gone; parameters that the plan
        froze ask for gradients again. The copy can be pickled, traced and passed to ``torch.export``.

        Norms of each example's statistics compute as in eval mode, whatever the mode. A recurrent layer with amplitudes
        takes padded tensors, no ``PackedSequence``.

        Raises:
            SpecError: norms leave out padding that the model's arguments name, or a head is fed from layers inside and
                torch.fx cannot trace the model.

        Example:
            >>> import torch, conservtl as ctl
            >>> source, model = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)) for _ in range(2))
            >>> plain = ctl.adapt(model, source, [ctl.LHUC()]).export()
            >>> torch.export.export(plain, (torch.zeros(1, 4),)).module()(torch.zeros(1, 4)).shape
            torch.Size([1, 2])
        """
        model: nn.Module = self.merged()
        for strategy in self.origin.inherited:
            strategy.merge(model)
        unload: Any = getattr(model, "merge_and_unload", None)  # an adapter's model
        if callable(unload):
            model = unload()
        for strategy in (*self.origin.strategies, *self.origin.inherited):
            model = strategy.plain(model)
        while extended := extended_modules(model):
            first = next(iter(extended.values()))
            model = replace_module(model, first, first.plain())
        thaw(model)
        for module in model.modules():
            _strip(module)
        return unwrap(model).eval()


def _strip(module: nn.Module) -> None:
    """Remove hooks and replaced methods of this package from a module."""
    tables = [*hook_tables(module), *load_hook_tables(module)]
    ours = {key for table in tables for key, hook in table.items() if _is_ours(hook)}
    for table in tables:
        for key in ours.intersection(table):
            if _is_ours(table[key]) or isinstance(table[key], bool):
                del table[key]
    for name in [name for name, value in vars(module).items() if _is_ours(value)]:
        del vars(module)[name]


def _is_ours(value: Any) -> bool:
    """Whether an object, or what it wraps, is of this package."""
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__self__", getattr(value, "hook", value))
    if isinstance(value, (nn.Module, type)):
        return False
    where = getattr(value, "__module__", None) or type(value).__module__
    return str(where).partition(".")[0] == _PACKAGE
