"""Freezing, the same for all strategies: no gradient, no update, no change of running statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from conservtl.compat import BatchNormBase, NormBase
from conservtl.layers import Layer, canonical, layer_of, named_parameters
from conservtl.plan.row import Row

__all__ = [
    "freeze",
    "hold_statistics",
    "holds",
    "keeps_batch_statistics",
    "norms_with_rows",
    "tracks_statistics",
]


class _StayInEval:
    """Replaces a norm's ``train`` method, which every ``model.train()`` calls."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, mode: bool = True) -> nn.Module:  # noqa: ARG002 - the signature of Module.train
        self.norm.training = False
        return self.norm


def freeze(parameters: Mapping[str, nn.Parameter], frozen: Collection[str], keep: Collection[str] = ()) -> None:
    """Freeze these parameters and train the others.

    A frozen parameter's ``grad`` is set to None: with a zero gradient it would still get weight decay and momentum.

    Args:
        parameters: all parameters by name.
        frozen: names to freeze.
        keep: names among them that still receive gradients, which are dropped before each step: DDP would never
            synchronise a parameter that is unfrozen after wrapping.
    """
    for name, parameter in parameters.items():
        parameter.requires_grad_((name not in frozen or name in keep) and parameter.is_floating_point())
        if name in frozen:
            parameter.grad = None


def norms_with_rows(model: nn.Module, rows: Iterable[Row], layers: tuple[Layer, ...]) -> dict[nn.Module, list[Row]]:
    """Return each norm that tracks statistics with the rows of its parameters, or of its layer if it has none."""
    rows_by_name = {row.name: row for row in rows if not row.added}
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    norms = {}
    for module, norm in model.named_modules():
        if tracks_statistics(norm):
            owned = [
                name for parameter in norm.parameters(recurse=False) if (name := names[id(parameter)]) in rows_by_name
            ]
            if not owned and (layer := layer_of(layers, canonical(module))):
                owned = [info.name for info in layer.parameters if info.name in rows_by_name]
            norms[norm] = [rows_by_name[name] for name in owned]
    return norms


def holds(rows: Sequence[Row], frozen: Collection[str]) -> bool:
    """Whether a norm with these rows keeps its statistics: all rows are frozen, or a strategy decides so."""
    return any(row.statistics == "hold" for row in rows) or (bool(rows) and all(row.name in frozen for row in rows))


def hold_statistics(norms: Iterable[nn.Module], held: Collection[nn.Module], training: bool) -> None:
    """Keep the norms of frozen layers in eval mode through every ``train()``, and release the others.

    Args:
        norms: all norms that track statistics.
        held: those whose layers are frozen.
        training: mode of the model, which a released norm takes.
    """
    for norm in norms:
        if norm in held:
            norm.__dict__["train"] = _StayInEval(norm)
            norm.training = False
        elif norm.__dict__.pop("train", None) is not None:
            norm.train(training)


def tracks_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics of its inputs."""
    return isinstance(module, NormBase) and module.track_running_stats


def keeps_batch_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm that keeps running statistics; an instance norm uses each example's own."""
    return isinstance(module, BatchNormBase) and tracks_statistics(module)
