"""Learning hidden unit contributions: an amplitude for each hidden unit, and little else to train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from conservtl.compat import BatchNormBase, forward_hooks, remove_forward_hooks
from conservtl.errors import PlanError, SelectorError, SpecError
from conservtl.layers import Layer, canonical, layer_of, matches, unwrap
from conservtl.layers.extended import own_class
from conservtl.layers.first_use import first_use
from conservtl.layers.names import glob_hint, holder_counts, own_parameters
from conservtl.methods.base import Order, Strategy
from conservtl.plan.plan import Plan

__all__ = ["LHUC", "PARAMETER", "hidden_units"]


PARAMETER = "lhuc"
"""The amplitudes' name on the module whose output they scale."""

_WEIGHTS: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}
_RECURRENT: dict[type[nn.Module], int] = {nn.RNN: -1, nn.LSTM: -1, nn.GRU: -1}
_NORMS: dict[type[nn.Module], int] = {BatchNormBase: 1, nn.SyncBatchNorm: 1, nn.GroupNorm: 1, nn.LayerNorm: -1}
_NORMS |= {nn.RMSNorm: -1}
_SIZES = ("out_features", "out_channels", "num_features", "num_channels", "normalized_shape")


def hidden_units(
    model: nn.Module, layers: Sequence[Layer], on: Sequence[str] | None = None, example: Any = None
) -> list[str]:
    """Names of the modules whose outputs are hidden units.

    By default each linear map, convolution and recurrent layer of every layer but the last, or the norm behind it:
    what the norm puts out is what the activation gets.

    Args:
        model: wrapped or not.
        layers: its layers, input side first.
        on: globs of layers (all of their units) or modules instead.
        example: an input, which shows what is behind what; else the order of registration does.

    Raises:
        SpecError: there are none.
        SelectorError: a glob matches none.
    """
    scalable = {name: module for name, module in _outside_attention(unwrap(model)) if _size(module) is not None}
    if example is not None:
        scalable = _by_use(scalable, first_use(unwrap(model), example))
    units = _units(scalable, layers)
    if on is None:
        found = [name for name, layer in units.items() if layer != layers[-1].name]
        if not found:
            raise SpecError(
                f"LHUC: {type(model).__name__} has no hidden linear map, convolution or recurrent layer whose units "
                "could be scaled, nothing but its head. Adapt it by another strategy."
            )
        return found
    chosen: dict[str, None] = {}
    for glob in on:
        inside = [name for name, layer in units.items() if matches(glob, layer)]
        inside = inside or [name for name in scalable if matches(glob, name)]
        if not inside:
            raise SelectorError(
                f"LHUC: {glob!r} must match a layer, or a linear, convolutional, recurrent or normalising module "
                f"whose output can be scaled; it matches none."
                f"{glob_hint(glob, [*dict.fromkeys(units.values()), *scalable])}"
            )
        chosen |= dict.fromkeys(inside)
    return list(chosen)


def _by_use(modules: Mapping[str, nn.Module], used: Mapping[str, int]) -> dict[str, nn.Module]:
    """In the order in which they are used; what is not comes last."""
    places: dict[str, int] = {}
    for tensor, place in used.items():
        places.setdefault(tensor.rpartition(".")[0], place)
    return dict(sorted(modules.items(), key=lambda item: places.get(item[0], len(used))))


def _units(scalable: Mapping[str, nn.Module], layers: Sequence[Layer]) -> dict[str, str]:
    """Module whose outputs are a layer's units -> the layer: each weight, or the norm behind it."""
    units: dict[str, str] = {}
    before: tuple[str, str, int | None] | None = None  # the last weight, its layer and size
    for name, module in scalable.items():
        layer = layer_of(layers, name)
        if layer is None:
            continue
        if _axis(module, _NORMS) is None:
            before = (name, layer.name, _size(module))
            units[name] = layer.name
        elif before is not None and before[1:] == (layer.name, _size(module)):
            del units[before[0]]
            units[name] = layer.name
            before = None
    return units


def _extend(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Put amplitudes of 1 on these modules; returns the parameters' names.

    Raises:
        SpecError: a module has some already; none is changed.
    """
    modules = {canonical(name): module for name, module in unwrap(model).named_modules()}
    if twice := [name for name in names if hasattr(modules[name], PARAMETER)]:
        raise SpecError(
            f"LHUC: module {twice[0]!r} has amplitudes already. Merge or retract those of an earlier adaptation first "
            "(LHUC().merge(model), LHUC().retract(model)), and name each module in one LHUC only."
        )
    like = next(unwrap(model).parameters())
    for name in names:
        module = modules[name]
        own = next(module.parameters(recurse=False), like)
        zeros = torch.zeros(_size(module) or 0, device=own.device, dtype=own.dtype)
        module.register_parameter(PARAMETER, nn.Parameter(zeros))
        module.register_forward_hook(_scale, prepend=True)
    return [f"{name}.{PARAMETER}" if name else PARAMETER for name in names]


def _retract(model: nn.Module) -> None:
    """Take all amplitudes away."""
    for module in _extended(model):
        _remove(module)


@torch.no_grad()
def _merge(model: nn.Module) -> bool:
    """Multiply amplitudes into the weights and biases they scale; whether none is left.

    Those of recurrent layers, of norms without weights, of weights that another module shares and of parametrised
    ones stay.
    """
    holders = holder_counts(model)
    left = False
    for module in _extended(model):
        own = own_parameters(module)
        values = [own[name] for name in ("weight", "bias") if name in own]
        shared = any(holders[id(value)] > 1 for value in values)
        if "weight" not in own or shared or _axis(module, _RECURRENT) is not None:
            left = True
            continue
        factor = _amplitude(own[PARAMETER])
        for value in values:
            value.mul_(factor.view(-1, *[1] * (value.ndim - 1)))
        _remove(module)
    return not left


def _amplitude(parameter: Tensor) -> Tensor:
    return 2 * torch.sigmoid(parameter)


def _scale(module: nn.Module, _: Any, output: Any) -> Any:
    """The forward hook. A function of this module, so that it survives copies and pickles of the model."""
    factor = _amplitude(getattr(module, PARAMETER))
    if isinstance(output, tuple):  # of a recurrent layer: what comes out at each step, not the state
        first, *state = output
        if isinstance(first, PackedSequence):
            return first._replace(data=first.data * factor.to(first.data.dtype)), *state
        return first * factor.to(first.dtype), *state
    shape = [1] * output.ndim
    shape[_axis(module, _WEIGHTS | _NORMS) or 0] = -1
    return output * factor.to(output.dtype).view(shape)


def _axis(module: nn.Module, kinds: dict[type[nn.Module], int]) -> int | None:
    """Which axis of its output holds the channels; None for other kinds, and those with a forward of their own."""
    return next((axis for kind, axis in kinds.items() if own_class(module).forward is kind.forward), None)


def _size(module: nn.Module) -> int | None:
    """Number of channels that it puts out; None where it is of no kind that can be scaled."""
    if _axis(module, _WEIGHTS | _NORMS | _RECURRENT) is None:
        return None
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    size = next(getattr(module, name) for name in _SIZES if hasattr(module, name))
    if isinstance(size, tuple):
        return size[0] if len(size) == 1 else None
    return int(size)


def _outside_attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by canonical name; torch's attention never calls its projection, so hooks there would do nothing."""
    attentions = (module for module in model.modules() if isinstance(module, nn.MultiheadAttention))
    inside = {id(part) for attention in attentions for part in attention.modules()}
    return ((canonical(name), module) for name, module in model.named_modules() if id(module) not in inside)


def _extended(model: nn.Module) -> list[nn.Module]:
    return [module for module in unwrap(model).modules() if _scale in forward_hooks(module)]


def _remove(module: nn.Module) -> None:
    remove_forward_hooks(module, lambda hook: hook is _scale)
    delattr(module, PARAMETER)


_REASON = "amplitudes of hidden units, which start at 1"


class LHUC(Strategy):
    r"""Scale each hidden unit by an amplitude of its own between 0 and 2, learned from the target.

    .. math:: h' = 2\,\sigma(r) \circ h

    with r = 0 at the start, so that the model computes what it did; its parameters keep their names, and r stands
    beside them as ``lhuc``. A weight decay on r, the optimizer's or ``L2SP(beta=..., on="all")``, pulls to amplitude 1.

    What is scaled is the output of a linear map or convolution, or of the norm behind it: for a ReLU that is the same
    as scaling what the ReLU gives, as the amplitude is positive; for other activations it is the variant that scales
    before them. Of a recurrent layer it is the output at each step (for several levels, of the last); its state is not
    scaled. ``merge`` (``adaptation.merged()``) multiplies the amplitudes into weights and biases, exactly to rounding,
    so that the adapted model costs nothing; those of recurrent layers stay.

    Amplitudes want a larger rate than weights: with AdamW on spoken digits, 3e-2 did better than 1e-2.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: -0.6 ± 0.4, -0.7 ± 0.4 and -1.3 ± 1.7
    (benchmarks/results/methods.md). So it loses to it for a speaker: a few numbers to keep for each are its gain, not
    accuracy.

    Cost: one number a unit to train and to keep for each speaker, a product a layer in each step.

    Reference:
        Swietojanski and Renals 2014, "Learning hidden unit contributions for unsupervised speaker adaptation of neural
        network acoustic models", section 2. Swietojanski, Li and Renals 2016, "Learning hidden unit contributions for
        unsupervised acoustic model adaptation", section III.
    """

    kind: Literal["lhuc"] = "lhuc"
    order: ClassVar[Order] = Order.HEAD
    on: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Globs of layers or modules whose units are scaled. None: all layers but the last."""
    freeze: bool = True
    """Whether everything but the amplitudes, and what else is fresh, is frozen."""

    @property
    def extends(self) -> bool:
        """It adds amplitudes."""
        return True

    def apply(self, plan: Plan) -> Plan:
        """Choose what is frozen."""
        if not any(row.added and row.name.rpartition(".")[2] == PARAMETER for row in plan.rows):
            raise PlanError(f"{self.label}: the plan's model has no amplitudes. Let adapt(model, ...) put them there.")
        if not self.freeze:
            return plan
        rows = [row for row in plan.rows if "frozen" in row.chosen or not row.frozen]  # what has no gradient stays
        frozen = {row.name: {"frozen": row.origin == "source"} for row in rows}
        return plan.choose(self.label, "frozen", frozen, explicit=False)

    def extend(self, model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, str]:
        """Put amplitudes of 1 on the hidden units."""
        return dict.fromkeys(_extend(model, hidden_units(model, layers, self.on, example)), _REASON)

    def retract(self, model: nn.Module) -> None:
        """Take the amplitudes away."""
        _retract(model)

    def merge(self, model: nn.Module) -> bool:
        """Multiply the amplitudes into the weights they scale."""
        return _merge(model)
