"""The head of a model: named, asked of the model, or the last weight used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from conservtl.compat import ConvBase
from conservtl.errors import SelectorError
from conservtl.layers.first_use import Trace
from conservtl.layers.info import Layer, ParameterInfo
from conservtl.layers.names import canonical, matches, named_modules, own_parameters, owner, select
from conservtl.layers.units import is_adapted

__all__ = ["mark_head"]

_SINGLE = (nn.Linear, ConvBase)


def mark_head(
    model: nn.Module, layers: tuple[Layer, ...], record: Trace | None, head: Sequence[str] | None
) -> tuple[Layer, ...]:
    """Return the layers with the head's parameters marked, or with all that may be the head."""
    infos = {info.name: info for layer in layers for info in layer.parameters}
    outputs = _modules_of(record.outputs, infos) if record is not None and not record.main else []
    named = _named(head, infos) if head is not None else _asked(model, infos, record)
    found = named or _last(model, infos, layers, record)
    known = named or (len(found) == 1 and not _says_none(model))
    heads, candidates = (found, []) if known else ([], found)

    def marked(info: ParameterInfo) -> ParameterInfo:
        names = [owner(name) for name in (info.name, *info.aliases)]

        def of(modules: list[str]) -> str | None:
            return next((module for module in modules if module in names), None)

        several = outputs if len(outputs) > 1 else []
        return replace(info, head=of(heads), candidate=of(candidates), output=of(several))

    return tuple(replace(layer, parameters=tuple(map(marked, layer.parameters))) for layer in layers)


def _named(head: Sequence[str], infos: Mapping[str, ParameterInfo]) -> list[str]:
    """Return the modules whose parameters the globs match."""
    names = [name for info in infos.values() for name in (info.name, *info.aliases)]
    try:
        chosen = select(head, names)
    except SelectorError as error:
        raise SelectorError(f"head: {error}") from None
    return list(dict.fromkeys(owner(name) for glob in head for name in chosen[glob]))


def _asked(model: nn.Module, infos: Mapping[str, ParameterInfo], record: Trace | None) -> list[str]:
    """Return the modules that the model itself calls its output layer or classifier; none if it has no such method."""
    modules = {id(module): canonical(name) for name, module in model.named_modules()}
    found = []
    for module in _answers(model):
        weights = [
            name
            for info in infos.values()
            for name in (info.name, *info.aliases)
            if id(module) in modules and info.kind == "weight" and matches(modules[id(module)], name)
        ]
        if weights:
            order = record.order if record is not None else {}
            found.append(owner(max(weights, key=lambda name: (order.get(name, -1), weights.index(name)))))
    return list(dict.fromkeys(found))


def _answers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what a model of Hugging Face or timm gives as its head."""
    for method in ("get_output_embeddings", "get_classifier"):
        answer = None
        with suppress(Exception):  # no such method, or one that this model does not implement
            answer = getattr(model, method)()
        answers = [one for one in (answer if isinstance(answer, tuple) else [answer]) if isinstance(one, nn.Module)]
        if answers:
            yield from answers
            return
    classifier = getattr(model, "classifier", None)
    if hasattr(model, "get_output_embeddings") and isinstance(classifier, nn.Module):
        yield classifier


def _says_none(model: nn.Module) -> bool:
    """Whether the model has no head: timm's with ``num_classes=0`` say so, Hugging Face's encoders take no labels."""
    answers = list(_answers(model))
    if hasattr(model, "get_output_embeddings") and getattr(model, "base_model", None) is model and not answers:
        return not any("label" in name for name in inspect.signature(model.forward).parameters)
    return bool(answers) and not any(True for module in answers for _ in module.parameters())


def _last(
    model: nn.Module, infos: Mapping[str, ParameterInfo], layers: tuple[Layer, ...], record: Trace | None
) -> list[str]:
    """Return the modules that compute the outputs; more than one if several remain possible."""
    if record is not None and record.outputs:
        return _modules_of(record.outputs, infos)
    registered = [canonical(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    weights = {name: info for info in infos.values() if info.kind == "weight" for name in (info.name, *info.aliases)}
    last = next((name for name in reversed(registered) if name in weights), None)
    if record is None and last is not None and last not in infos:
        return [owner(last)]  # tied to a weight registered before it
    final = layers[-1].parameters
    inside = [info for info in final if info.kind == "weight"] or list(final)
    module = owner(inside[-1].name)
    return [module] if record is not None else list(dict.fromkeys([*_parallel(model, module), module]))


def _modules_of(names: Sequence[str], infos: Mapping[str, ParameterInfo]) -> list[str]:
    """Return the module of each weight; of a tied one, the module registered last, which is no embedding by name."""
    return list(dict.fromkeys(owner((name, *infos[name].aliases)[-1]) for name in names if name in infos))


def _parallel(model: nn.Module, last: str) -> Iterator[str]:
    """Yield modules beside the last, in order of registration, whose outputs no later module can take.

    This is for models without an example: two linear maps of one input side by side, or parts of the model of which
    the later one cannot take what the earlier one gives.
    """
    modules = named_modules(model)
    holder = modules.get(last.rpartition(".")[0]) if last else None
    if holder is not None and not isinstance(holder, nn.Sequential):
        before: list[tuple[str, nn.Module]] = []
        for name, child in holder.named_children():
            full = ".".join(part for part in (last.rpartition(".")[0], canonical(name)) if part)
            if full == last:
                break
            before.append((full, child))
        for name, child in before:
            size, final = _sizes(child), _sizes(modules[last])
            if size and final and type(child) is type(modules[last]) and _beside(size, final):
                yield name
    final = _sizes(modules[last]) if last in modules else None
    for name in _branches(model) if final else ():
        size = _sizes(modules[name])
        if name != last and final and size and size[1] > 1:
            yield name


def _beside(size: tuple[int, int], final: tuple[int, int]) -> bool:
    """Whether two maps take the same input, and the second cannot take the output of the first."""
    return size[0] == final[0] and 1 < size[1] != final[0]


@dataclass(frozen=True)
class _Part:
    """A part of a model.

    Args:
        name: its name.
        module: the part.
        weights: name and sizes of each linear map or convolution.
        whole: whether it has no other weights.
        maps: whether it ends in a convolution, whose output may be flattened.
    """

    name: str
    module: nn.Module
    weights: list[tuple[str, tuple[int, int]]]
    whole: bool
    maps: bool


def _branches(model: nn.Module) -> Iterator[str]:
    """Yield the last weights of the parts that no later part can take the output of, at each level of the last part."""
    prefix, listed = "", False
    while not (isinstance(model, nn.Sequential) or is_adapted(model)):
        parts = [
            _part(prefix, name, child)
            for name, child in model.named_children()
            if any(True for _ in child.parameters())
        ]
        outputs = {part.weights[-1][1][1] for part in parts[:-1] if part.weights}
        for number, part in enumerate(parts[:-1]):
            later = parts[number + 1 :]
            if not part.weights or not all(one.weights and one.whole for one in later):
                continue
            taken = {size[0] for one in later for _, size in one.weights}
            (_, (enters, _)), (last, (_, given)) = part.weights[0], part.weights[-1]
            if any(size == given or (part.maps and size % given == 0) or size - given in outputs for size in taken):
                continue
            # A predictor: maps of one input.
            beside = all(size[0] == enters and size[1] != enters for _, size in part.weights)
            compound = [one for one in later if len(one.weights) > 1 or isinstance(part.module, nn.Sequential)]
            again = any(one.weights[0][1][0] == enters for one in compound)  # a later part takes the same input
            alike = given == parts[-1].weights[-1][1][1]  # an auxiliary classifier
            if beside:
                yield from (name for name, _ in part.weights)
            elif listed or again or alike:
                yield last
        if not parts:
            return
        prefix, model, listed = f"{parts[-1].name}.", parts[-1].module, isinstance(model, nn.ModuleList | nn.ModuleDict)


def _part(prefix: str, name: str, module: nn.Module) -> _Part:
    leaves = [(inner, leaf) for inner, leaf in module.named_modules() if own_parameters(leaf)]
    names = [canonical(".".join(one for one in (f"{prefix}{name}", inner) if one)) for inner, _ in leaves]
    weights = [(full, sizes) for full, (_, leaf) in zip(names, leaves, strict=True) if (sizes := _sizes(leaf))]
    whole = all(_sizes(leaf) or all(p.ndim < 2 for p in own_parameters(leaf).values()) for _, leaf in leaves)
    maps = [isinstance(leaf, ConvBase) for _, leaf in leaves if _sizes(leaf)]
    return _Part(f"{prefix}{canonical(name)}", module, weights, whole, maps[-1:] == [True])


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the number of channels that a linear map or convolution takes and gives; None for other modules."""
    if not isinstance(module, _SINGLE):
        return None
    one: Any = module
    return (one.in_features, one.out_features) if isinstance(one, nn.Linear) else (one.in_channels, one.out_channels)
