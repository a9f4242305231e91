"""Scores of an adaptation before and after: the gain on the target and the loss on the source, in any loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine.batching import as_batches
from conservtl.engine.evaluation import Functions, Holdout
from conservtl.engine.evaluation import evaluate as score
from conservtl.engine.randomness import preserve_rng
from conservtl.errors import SpecError
from conservtl.experiments.own.paired import BEFORE, SHARED, Pair, named
from conservtl.fragments import fragment
from conservtl.functions import Forward, Loss, Metrics, accuracy, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.layers import named_parameters, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.plan.row import Row
from conservtl.report.text.html_table import HtmlTable
from conservtl.report.text.metrics import metrics_of
from conservtl.report.text.tables import gain_table
from conservtl.runtime.preserve import preserve_buffers
from conservtl.runtime.source_model import SourceHead

__all__ = ["Gains", "evaluate"]


@dataclass(frozen=True)
class Gains(Mapping[str, Any]):
    """Metrics of an adaptation's sets before and after; a dictionary of its fields, which ``ctl.save`` takes.

    Args:
        before: set -> loss and metrics of the source as it is; None where a fresh head has no such score.
        after: set -> loss and metrics with the present weights.
        agreement: ``{"after": {"agreement": share of the target's answers that are the source model's, "kl": mean
            KL(source || adapted) in nats}}``; None where the outputs are no classes, or cannot be compared.
        notes: remarks on how the sets were scored.
    """

    before: Mapping[str, Mapping[str, float] | None]
    after: Mapping[str, Mapping[str, float]]
    agreement: Mapping[str, Mapping[str, float]] | None = None
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return {"before": self.before, "after": self.after, "agreement": self.agreement}[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("before", "after", "agreement"))

    def __len__(self) -> int:
        return 3

    def _table(self) -> HtmlTable:
        every = {name: metrics_of(self, name) for name in self.after}
        shown = {name: [one for one in each if one.key != "loss"] or each for name, each in every.items()}
        return gain_table(self, shown, "fresh")

    def __str__(self) -> str:
        return "\n".join([str(self._table()), *self.notes])

    def _repr_html_(self) -> str:
        return fragment(self._table()._repr_html_(), notes=self.notes)


def evaluate(
    adaptation: Adaptation,
    sets: Mapping[str, Any],
    *,
    forward: Forward = plain_forward,
    loss: Loss = cross_entropy,
    metrics: Metrics = accuracy,
    source: nn.Module | None = None,
    batch_size: int = 256,
) -> Gains:
    """Return what the target gained and what the source lost, at any time of training, in any loop.

    Each set is scored with the source as it is (``adaptation.at_start()``) and with the present weights, in eval mode.
    Weights, statistics, modes, random generators and the optimizer stay as they are. With many processes each scores
    the data that it is given.

    A head that is fresh gives no score before. With ``source``, the source model, the set named ``source`` is scored
    by the source's own head on both bodies, and so is the agreement on the target; a model that a strategy compares
    outputs with is found without.

    Args:
        adaptation: result of ``adapt``, trained in your own loop or by ``fit``.
        sets: {"target": held-out data, "source": data of the source}, or other names. Data as ``fit`` takes it:
            tensors, a dataset, a DataLoader, ``Sequences``; or a ``Holdout`` with functions of its own.
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar, or a loss of torch.
        metrics: (outputs, batch) -> {name: mean over the batch, or (sum, count) to pool over the set}.
        source: the source model, to score a source whose head is not the model's; left unchanged.
        batch_size: examples per batch, for data that is not batched yet.

    Returns:
        The scores, printed as a table; ``ctl.save(..., metrics=gains)`` writes them on the card.

    Raises:
        SpecError: an argument is wrong, parameters are sharded, or the source's set needs the source's head.
        DataError: a set is empty or of an unknown kind.

    Example:
        >>> import torch, conservtl as ctl
        >>> adaptation = ctl.adapt(torch.nn.Linear(1, 2), torch.nn.Linear(1, 2), [ctl.L2SP()])
        >>> data = torch.ones(4, 1), torch.zeros(4, dtype=torch.long)
        >>> gains = ctl.evaluate(adaptation, {"target": data})
        >>> gains.before == gains.after
        True
    """
    if not isinstance(adaptation, Adaptation):
        raise SpecError(f"evaluate takes the result of adapt(model, source, ...); received {_kind(adaptation)}.")
    if not isinstance(sets, Mapping) or not sets or not all(isinstance(name, str) for name in sets):
        raise SpecError(
            f"sets must be named: evaluate(adaptation, {{'target': data, 'source': data}}); received {_kind(sets)}."
        )
    if source is not None and not isinstance(source, nn.Module):
        raise SpecError(f"source must be the source model, a torch.nn.Module; received {_kind(source)}. Load it first.")
    functions, model = Functions(forward, loss, metrics), unwrap(adaptation.model)
    device = next(iter(named_parameters(model).values())).device
    fresh = _fresh(adaptation)
    by_label = any(row.new_rows for row in fresh)
    if by_label and source is not None:
        raise SpecError(
            "source: rows of the head are copied by label, so the set 'source' has the target's numbers of labels, and "
            "the source's own head others. Leave source out."
        )
    heads: tuple[str, ...] = ()
    if not by_label and adaptation.plan.possible_head & {row.name for row in fresh}:
        heads = adaptation.plan.head_modules
    start = adaptation.at_start() if not fresh else None if by_label else _source(adaptation, source, device)
    exchanged = [] if start is None else [SourceHead(start, name) for name in heads]
    if heads and start is None:
        _check_head(sets, fresh)
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    agreement = None
    with preserve_buffers(model):
        for name, given in sets.items():
            data = given if isinstance(given, Holdout) else Holdout(given)
            own = heads if name == "source" else ()
            pair = Pair(
                functions.of(data),
                None if heads and not own else start,
                exchanged if own else (),
                (start, exchanged) if name == "target" and start is not None else None,
            )
            batches = as_batches(data.data, batch_size, device, shuffle=False)
            with preserve_rng(batches.generators):
                found = score(model, batches, Functions(pair.forward, pair.loss, pair.metrics), device)
            shared = named(found, SHARED)
            agreement = {"after": shared} if shared else agreement
            before[name] = named(found, BEFORE) or None
            after[name] = {key: value for key, value in found.items() if not key.startswith((BEFORE, SHARED))}
    return Gains(before, after, agreement, _notes(fresh, heads, sets, start))


def _fresh(adaptation: Adaptation) -> list[Row]:
    """Return the rows whose starting values are not the source's; additions change nothing at the start."""
    plan = adaptation.plan
    rows = [plan[name] for name in plan.fresh]
    return [row for row in rows if not row.added and not (row.as_found and row.source_shape is None)]


def _source(adaptation: Adaptation, source: nn.Module | None, device: torch.device) -> nn.Module | None:
    """Return a copy of the source model, given or kept for a strategy that compares with it; None: it is not known."""
    kept = adaptation.origin.source_model
    known = source if source is not None else kept if isinstance(kept, nn.Module) else None
    return None if known is None else deep_copy(unwrap(known)).to(device).eval()


def _check_head(sets: Mapping[str, Any], fresh: list[Row]) -> None:
    """Raise if the source's set needs a head that the model does not have."""
    own = sets.get("source")
    reshaped = next((row for row in fresh if (row.source_shape or row.shape) != row.shape), None)
    if own is not None and reshaped is not None and not (isinstance(own, Holdout) and (own.forward or own.metrics)):
        raise SpecError(
            f"evaluate: the set 'source' has the source's labels, and the head {reshaped.layer!r} is fresh. Pass "
            "source=the source model, whose head is then scored on the adapted body, or leave the set out."
        )


def _notes(fresh: list[Row], heads: tuple[str, ...], sets: Mapping[str, Any], start: Any) -> tuple[str, ...]:
    notes = []
    if fresh and (heads or start is None):
        notes.append(f"fresh: {fresh[-1].layer} starts from new values, so the source has no score there")
    if heads and start is not None and sets.keys() & {"source", "target"}:
        scored = " and ".join([*(["source"] if "source" in sets else []), *(["answers"] if "target" in sets else [])])
        notes.append(f"{scored}: by the source's own head, before on the source's body, after on the adapted one")
    return tuple(notes)


def _kind(given: Any) -> str:
    return type(given).__name__ if given else repr(given)
