"""The plan before any strategy, with the values to copy; and the source model that a plan compares with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from conservtl.errors import SelectorError, SpecError
from conservtl.layers import Layer, matches, named_parameters, select, unwrap
from conservtl.layers.names import owner
from conservtl.plan.plan import Plan
from conservtl.runtime.freezing import found_frozen, handed_in_frozen
from conservtl.runtime.source_model import build_source_model
from conservtl.source.by_label import HeadLabels
from conservtl.source.positions import resample_positions
from conservtl.source.read import Source
from conservtl.source.shared import SharedModel

__all__ = ["Draft", "compared_model", "declared_fresh", "draw", "headless_rows"]


@dataclass(frozen=True)
class Draft:
    """A plan before any strategy, and what it copies.

    Args:
        plan: origins and shapes alone.
        values: parameter -> source tensor.
        resampled: those among them that were fitted to the model's image size.
        declared: parameter that starts fresh although it may fit -> reason.
        notes: remarks for the plan.
    """

    plan: Plan
    values: dict[str, Tensor]
    resampled: dict[str, Tensor]
    declared: dict[str, str]
    notes: list[str]

    def has_own_labels(self, plan: Plan) -> bool:
        """Return whether the target has labels of its own: a head of another shape, or declared fresh.

        A head whose rows are copied by label is not of its own, unless a strategy made it fresh.
        """
        for row in (plan[name] for name in plan.possible_head):
            by_label = self.plan[row.name].source_rows is not None
            reshaped = (row.source_shape or row.shape) != row.shape
            if row.name in self.declared or (row.source_rows is None and (reshaped or by_label)):
                return True
        return False


def draw(
    model: nn.Module,
    source: Source,
    layers: Sequence[Layer],
    declared: Mapping[str, str],
    added: dict[str, str],
    labels: HeadLabels | None,
) -> Draft:
    """Draw up the plan of a model's parameters, before any strategy; ``declared`` and ``added`` give reasons."""
    parameters = named_parameters(model)
    values = source.values_of(layers)
    wanted = {name: parameter for name, parameter in parameters.items() if name not in declared}
    resampled, notes = resample_positions(model, values, wanted)
    values |= resampled
    shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
    fixed = [name for name, p in parameters.items() if not (p.is_floating_point() or p.is_complex())]
    frozen = found_frozen(model)
    frozen |= {name for name in added if handed_in_frozen(owner(name), layers, frozen, added)}
    fresh = dict(declared)
    plan = Plan.draw(layers, shapes, fresh | added, fixed, added, frozen)
    if labels is not None:
        plan = labels.applied(plan, unwrap(model), fresh)
        if not labels.common:
            fresh = dict.fromkeys(plan.head, "its labels differ from the source's") | fresh
            plan = Plan.draw(layers, shapes, fresh | added, fixed, added, frozen)
    return Draft(plan, values, resampled, fresh, notes)


def headless_rows(plan: Plan) -> dict[str, str]:
    """Return parameter -> reason for a head that the source lacks, as an encoder that was saved alone does."""
    rows = [plan[name] for name in plan.possible_head]
    return {row.name: "not among the source's tensors" for row in rows if row.source_shape is None and not row.added}


def compared_model(
    model: nn.Module, source: Source, plan: Plan, headless: Mapping[str, str], *, own_labels: bool
) -> nn.Module | SharedModel | None:
    """Return the source model, or None if the plan compares nothing with it.

    ``model`` is the one to adapt, before strategies add to it; ``headless`` are parameters of a head that the source
    lacks.
    """
    if not any(term.source for term in plan.terms) and all(one.data != "source" for one in plan.measures):
        return None
    # Parts of the model that the source lacks and nothing trains (a teacher, a table) are the same in both.
    constant = {row.name for row in plan.rows if row.as_found and row.source_shape is None}
    without = constant | set(headless) | (set(plan.possible_head) if own_labels else set())
    return build_source_model(model, source, [name for name in named_parameters(model) if name not in without])


def declared_fresh(layers: Sequence[Layer], fresh: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return parameter -> reason, for those declared fresh by a glob of parameter or layer names."""
    fresh = (fresh,) if isinstance(fresh, str) else fresh
    reasons = fresh if isinstance(fresh, Mapping) else {glob: f"declared fresh by fresh=[{glob!r}]" for glob in fresh}
    inside = {layer.name: [info.name for info in layer.parameters] for layer in layers}
    named = {name for names in inside.values() for name in names}
    if "head" in reasons and "head" not in inside and not any(matches("head", name) for name in named):
        drawn = Plan.draw(layers, {}, {})
        inside["head"] = list(drawn.head)
        if tied := drawn.tied_head:
            other = drawn.names_outside_head(tied[0])[0]
            raise SpecError(
                f"fresh: the head's weight is one tensor with {other!r}, so 'head' would start both anew. Untie them "
                f"(tie_word_embeddings=False), or say fresh={[other]} if both are to be."
            )
    globs = [glob for glob in reasons if glob not in inside]
    aliases = {info.name: info.aliases for layer in layers for info in layer.parameters}
    try:
        matched = inside | select(globs, list(aliases), aliases=aliases)
    except SelectorError as error:
        raise SelectorError(f"fresh: {error}") from None
    return {name: reason for glob, reason in reasons.items() for name in matched[glob]}
