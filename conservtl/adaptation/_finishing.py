"""Methods that end training: the plan's ``after`` decisions, and a model without what belongs to training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation import _export
from conservtl.adaptation._base import AdaptationBase
from conservtl.batches import check_batches
from conservtl.errors import SpecError
from conservtl.functions import Forward, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.layers import unwrap
from conservtl.plan.after import FinishContext

__all__ = ["FinishingMethods"]


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
        return _export.merged(self.bound)

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
        return _export.at_start(self.bound)

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
        return _export.export(self.bound)
