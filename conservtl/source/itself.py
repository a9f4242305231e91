"""A model that is its own source: the library that filled it with pretrained weights knows which values are new."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from conservtl.compat import filled_by_transformers
from conservtl.errors import SourceError, SpecError
from conservtl.layers import canonical, check_globs, named_parameters, select, unwrap
from conservtl.plan.plan import Plan
from conservtl.source.read import Source, own_tensors, read_source

__all__ = ["Itself", "check_heads", "check_own", "itself", "own_values"]


@dataclass(frozen=True)
class Itself:
    """The source is the model itself; ``itself`` makes it.

    Args:
        missing: globs of what no pretrained weights were loaded into; None: the model's library says.
    """

    missing: tuple[str, ...] | None = None


def itself(missing: Collection[str] | None = None) -> Itself:
    """Return the source of a model that holds pretrained weights already: the model itself.

    Its values are the starting point, in place: nothing is read or copied. Parameters that no pretrained weights were
    loaded into are fresh and keep their values. Without ``missing``, they are

    - of Hugging Face's models, and modules inside a model of your own: those that ``from_pretrained`` reports as
      missing or of another shape, and those that it never saw, such as a head that was added later;
    - of timm's models: the classifier, if it has another number of classes than the published weights.

    Args:
        missing: names or globs of those parameters or their modules, such as ``["head"]`` or the ``missing_keys`` of
            ``from_pretrained(..., output_loading_info=True)``; ``[]`` if all values are pretrained.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))  # its head is new
        >>> ctl.adapt(model, ctl.itself(missing=["1"]), [ctl.L2SP(alpha=0.1)]).plan.fresh
        ('1.weight', '1.bias')
    """
    check_globs("missing", missing)
    return Itself(None if missing is None else tuple(sorted(missing)))


def own_values(model: nn.Module, source: Itself) -> tuple[Source, dict[str, str]]:
    """Return a model's values as a source without those that are missing, and parameter -> reason of those.

    Raises:
        SpecError: it is not known which are missing.
        SelectorError: a glob of ``missing`` matches nothing.
    """
    read = read_source(model)
    parameters = named_parameters(model)
    if source.missing is None:
        missing = _reported(unwrap(model), parameters)
    else:
        tensors = select(source.missing, list({**dict.fromkeys(parameters), **dict.fromkeys(own_tensors(model))}))
        missing = {name: f"given as missing ({glob})" for glob, names in tensors.items() for name in names}
    if not missing:
        return read, {}
    every = {canonical(name): p for name, p in unwrap(model).named_parameters(remove_duplicate=False)}  # and if tied
    reasons = {id(every[name]): reason for name, reason in missing.items() if name in every}
    lacking = {name for name, parameter in every.items() if id(parameter) in reasons} | missing.keys()
    left = {name: tensor for name, tensor in read.tensors.items() if name not in lacking}
    fresh = {name: reasons[id(parameter)] for name, parameter in parameters.items() if id(parameter) in reasons}
    return replace(read, tensors=left, module=None), fresh


def check_own(plan: Plan, source: Source, model: nn.Module) -> None:
    """Raise if a model is given as its own source and everything in it is taken for pretrained."""
    if source.module is unwrap(model) and not any(row.fresh for row in plan.rows):
        raise SourceError(
            "the source is the model itself, and nothing in it is fresh: a head that no weights were loaded into would "
            "be taken for the source's. Name what is new (fresh=['head']), or give source=ctl.itself(), which asks the "
            "model's library; ctl.itself(missing=[]) says that all values are pretrained."
        )


def check_heads(plan: Plan, missing: Mapping[str, str]) -> None:
    """Raise if a term compares outputs with a source whose head no weights were loaded into."""
    head = next((row.name for row in plan.rows if row.name in plan.possible_head and row.name in missing), None)
    term = next((term for term in plan.terms if term.source and type(term).heads), None)
    if head is not None and term is not None:
        raise SourceError(
            f"{term.by} compares outputs with the source's, and no weights were loaded into the head: {head!r} is "
            f"{missing[head]}. Give a source model with its own head, or leave {term.by} out."
        )


def _reported(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Return parameter -> reason for what the model's library says is missing."""
    new = [name for name, parameter in parameters.items() if not filled_by_transformers(parameter)]
    if len(new) < len(parameters):
        return dict.fromkeys(new, "not among the weights that from_pretrained loaded")
    published = getattr(model, "pretrained_cfg", None)
    if published and hasattr(model, "get_classifier"):  # timm's
        classes, now = published.get("num_classes"), getattr(model, "num_classes", None)
        if classes == now:
            return {}
        answer: object = model.get_classifier()  # type: ignore[operator]
        heads = [one for one in (answer if isinstance(answer, tuple) else (answer,)) if isinstance(one, nn.Module)]
        held = {id(parameter) for head in heads for parameter in head.parameters()}
        reason = f"a classifier for {now} classes, and the published weights have {classes}"
        return {name: reason for name, parameter in parameters.items() if id(parameter) in held}
    raise SpecError(
        f"source: {type(model).__name__} does not say which of its values are pretrained; only models that Hugging "
        "Face's from_pretrained filled, and timm's, do. Name what is new: ctl.itself(missing=['head']), or missing=[] "
        "if nothing is."
    )
