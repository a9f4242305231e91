"""The entry point: ``adapt`` draws up a plan and copies the source's weights; it never trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.earlier_run import (
    check_extensions_agree,
    inherited_strategies,
    run_note,
    saved_example,
    saved_extensions,
)
from conservtl.adaptation.origin import Origin, Structure, named_source
from conservtl.adaptation.preset import Preset
from conservtl.errors import SourceError, SpecError
from conservtl.layers import Layer, canonical, find_layers, matches, named_parameters, select, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.methods import Strategy, apply_all, as_strategy, extend_all, retract_all
from conservtl.plan.measure import Measure
from conservtl.plan.plan import Plan
from conservtl.runtime.freezing import found_frozen
from conservtl.runtime.source_model import build_source_model
from conservtl.source.by_label import HeadLabels
from conservtl.source.coverage import check_coverage, kept_note, missed_note, unused_note
from conservtl.source.itself import Itself, check_heads, check_own, own_values
from conservtl.source.kinds import check_kinds, check_model_kinds
from conservtl.source.positions import resample_positions
from conservtl.source.read import Source, SourceLike, own_tensors, read_source
from conservtl.source.structure import check_extensions, check_structure
from conservtl.source.transfer import transfer

__all__ = ["Adaptation", "adapt"]


def adapt(
    model: nn.Module,
    source: SourceLike | Itself,
    strategies: Sequence[Strategy | Mapping[str, Any]] | Preset = (),
    *,
    example: Any = None,
    layers: Sequence[str] | None = None,
    fresh: Sequence[str] | Mapping[str, str] = (),
    allow: Sequence[str] = (),
    head: Sequence[str] | None = None,
    key: str | None = None,
    prefix: str | None = None,
    rename: Mapping[str, str] | None = None,
    labels: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> Adaptation:
    """Draw up the plan, copy the source's weights and fix the anchors; nothing is trained.

    The model is changed in place (``adaptation.model is model``), after everything has been checked. With many
    processes, initialise the process group first, adapt, then wrap.

    A parameter that asks for no gradient (``requires_grad`` is False) is frozen throughout, and the plan says ``frozen
    as found``; a strategy trains it only if it names it or its layer (``LayerTransfer(layers=["encoder.0"],
    freeze=False)``, ``SurgicalFineTuning(block="encoder.0")``, a stage of ``GradualUnfreezing``, the new head of
    ``FeatureExtraction``). A norm whose parameters are all frozen keeps its running statistics. A parameter that is
    frozen by hand later stays frozen too, unless a phase has frozen it already at that moment: then torch sees no
    change, and a later phase trains it. Freeze before ``adapt`` what no phase is to train.

    Args:
        model: built for the target task, on any device.
        source: a path, a state dict or a model; or a name of weights, such as ``"hf:ORG/NAME@REVISION"``; see
            ``read_source``. ``ctl.itself()`` for a model that holds pretrained weights already.
        strategies: in any order; none is plain fine-tuning. Or a recipe (``ctl.recipe("vision")``), whose training
            settings are then those of ``adaptation.optimizer()``, ``adaptation.scheduler(steps=...)`` and ``fit``, and
            its treatment of batch norms that of the model.
        example: a batch as the model takes it (a tensor, a tuple of positional or a dictionary of keyword arguments),
            to find the order of layers by running a copy of the model once.
        layers: globs of parameter names, input side first, that define the layers.
        fresh: globs of parameters or layers not to copy although they fit, such as a head for other labels; or a
            mapping glob -> reason, which the plan shows. ``"head"`` means the head, unless a layer or parameter is
            called so.
        allow: globs of modules that the model may lack, or build differently, if the source is a model; and of
            parameters that the source may lack, if it has almost none of the model's.
        head: globs of the parameters or modules that are the head. None: the model is asked
            (``get_output_embeddings`` and ``classifier`` of Hugging Face models, ``get_classifier`` of timm's), else it
            is the last weight used. If the model has several outputs from different weights, what needs the head (a
            linear probe, ``FeatureExtraction``) is refused without it. A head tied to an embedding is named by its own
            name, such as ``["proj_out"]``.
        key: the entry of a checkpoint that holds the weights, such as ``"state_dict_ema"``; see ``read_source`` for
            the order without it.
        prefix: what the names of the wanted source tensors begin with; removed, and other tensors are left out.
        rename: regular expression -> replacement, for names of source tensors that differ from the model's.
        labels: of the head's outputs, for the target and for the source (``(["no", "yes", "stop"], ["yes", "no"])``).
            The head's rows of labels that both know are copied by label, whatever their order and number; the others
            are new. Strategies that pull to the source act on the copied rows only, and outputs are compared on the
            labels that both know. Without a label in common the head is fresh.

    Returns:
        The adaptation, at its starting point.

    Raises:
        InputError: one of its kinds; the message says what to change.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=0.1)])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        >>> adaptation.penalty().item()
        0.0
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a torch.nn.Module; received {type(model).__name__}.")
    if isinstance(strategies, (Strategy, str)):
        raise SpecError(f"strategies must be a list: write [{strategies!r}].")
    head_labels = None if labels is None else HeadLabels(labels)
    training = strategies.training if isinstance(strategies, Preset) else None
    given = strategies.strategies if isinstance(strategies, Preset) else strategies
    chosen = tuple(strategy for strategy in map(as_strategy, given) if strategy.concerns(unwrap(model)))
    check_model_kinds(model)
    missing: dict[str, str] = {}
    claimed = isinstance(source, Itself)
    if isinstance(source, Itself):
        if key or prefix or rename:
            raise SpecError(
                "key, prefix and rename say how to read a source; the model itself is none. Leave them out."
            )
        source, missing = own_values(model, source)
    read = read_source(source, key=key, prefix=prefix, rename=rename).matched(model)
    structure = Structure(example, None if layers is None else tuple(layers), head)
    if head_labels is not None:
        head_labels.check_run(read.run, read.where)
    inherited, saved = inherited_strategies(read, model), saved_extensions(read.run)
    _, layers = extend_all(model, inherited, saved_example(read.run) if example is None else example, layers, head)
    extended = [*inherited]
    try:
        if read.module is not None and read.module is not unwrap(model):
            check_structure(model, read.module, allow, {old: new for new, old in read.old_names.items()})
        own = own_tensors(model)
        check_kinds(read.tensors, own, read.where)
        read.check_finite(other_than=_masks(model))
        bare = deep_copy(unwrap(model)) if any(strategy.extends for strategy in chosen) else unwrap(model)
        added, layers = extend_all(model, chosen, example, layers, head)
        extended += chosen
        _check_merged(read, added)
        parts = find_layers(model, example, layers, head)
        values = read.values_of(parts)
        declared = missing | _declared(parts, fresh)
        parameters = named_parameters(model)
        wanted = {name: parameter for name, parameter in parameters.items() if name not in declared}
        resampled, notes = resample_positions(model, values, wanted)
        values |= resampled
        shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
        fixed = [name for name, p in parameters.items() if not (p.is_floating_point() or p.is_complex())]
        drawn = Plan.draw(parts, shapes, declared | added, fixed, added, found_frozen(model))
        if head_labels is not None:
            drawn = head_labels.applied(drawn, unwrap(model), declared)
            if not head_labels.common:
                declared = dict.fromkeys(drawn.head, "its labels differ from the source's") | declared
                drawn = Plan.draw(parts, shapes, declared | added, fixed, added, found_frozen(model))
        plan = apply_all(drawn, chosen, saved)
        notes += [] if head_labels is None else head_labels.notes(plan)
        check_extensions_agree(plan, saved, read.where)
        _check_trained(plan)
        _check_source_rows(plan)
        rebuilt = read.shared is None and read.as_model_has(resampled).module is None
        headless = _headless(plan) if rebuilt else {}
        check_heads(plan, missing | headless)
        if not claimed:
            check_own(plan, read, model)
        check_coverage(plan, read, own, declared, allow)
        for decision in plan.decisions:
            decision.check(unwrap(model))
        if read.module is not None:
            check_extensions(plan, read.module)
        own_labels = _has_own_labels(plan, drawn, declared)
        heads = plan.head_modules if own_labels and any(term.heads for term in plan.terms) else ()
        # Parts of the model that the source lacks and nothing trains (a teacher, a table) are the same in both.
        constant = {row.name for row in plan.rows if row.as_found and row.source_shape is None}
        wanted_names = [name for name in named_parameters(bare) if name not in constant]
        names = [name for name in wanted_names if name not in headless]
        names = [name for name in names if not (own_labels and name in plan.possible_head)]
        compared = any(term.source for term in plan.terms) or any(measure.data == "source" for measure in plan.measures)
        source_model = build_source_model(bare, read.as_model_has(resampled), names) if compared else None
    except BaseException:
        retract_all(model, extended)
        raise
    report = transfer(model, parts, plan, values, read)
    known = {name: tensor for name, tensor in own.items() if name not in declared}
    if hasattr(unwrap(model), "peft_config") and read.shared is None:
        notes.append(
            "the model has an adapter of PEFT, whose factors are parameters like others here: conservtl.integrations."
            "peft.adapt takes the model without it as the source, and its L2SP acts on the merged weights"
        )
    notes += [
        *unused_note(report.unused, read.tensors),
        *kept_note(report.kept, own),
        *missed_note(read, known),
    ]
    plan = plan.with_notes((*read.notes, *run_note(read), *notes))
    origin = Origin(drawn, chosen, source_model, heads, inherited, saved, training, structure, named_source(read))
    return Adaptation(model, plan, report, parts, origin)


def _check_trained(plan: Plan) -> None:
    """Raise if parameters were handed in frozen, and nothing is trained, measured or fitted."""
    found = [row for row in plan.rows if row.as_found and row.found == "frozen"]
    if plan.trained or plan.searches or not found:
        return
    acts = any(type(measure).use is not Measure.use for measure in plan.measures)
    if not acts and all(type(after).interpolates for after in plan.after):
        rest = "" if len(found) == len(plan.rows) else ", and the strategies freeze the others"
        raise SpecError(
            f"model: {len(found)} of its {len(plan.rows)} parameters ask for no gradient (requires_grad is False)"
            f"{rest}, so nothing would be trained. Call requires_grad_(True) on those to train before adapt, or name "
            "them in a strategy, such as LayerTransfer(layers=[...], freeze=False)."
        )


def _check_source_rows(plan: Plan) -> None:
    """Raise if rows of labels that the source does not know are never trained, or outputs have one label in common."""
    for row in (row for row in plan.rows if row.new_rows and row.frozen):
        by = row.chosen["frozen"].by if "frozen" in row.chosen else "requires_grad=False"
        raise SpecError(
            f"labels: the rows of labels that the source does not know must be trained; {row.name!r} has "
            f"{len(row.new_rows)} and is frozen by {by}. Train its layer {row.layer!r}."
        )
    for term in plan.terms if plan.source_rows is not None else ():
        known = len(plan.source_rows or ()) - (plan.source_rows or ()).count(None)
        if type(term).heads and known < 2 and getattr(term, "form", None) in (None, "softmax"):
            raise SpecError(
                f"{term.by} compares the outputs of labels that both know; the softmax of {known} label is always 1. "
                "Declare the head fresh (fresh=['head']), so that the source's own head is compared, or say "
                "form='sigmoid'."
            )


def _has_own_labels(plan: Plan, drawn: Plan, declared: Mapping[str, str]) -> bool:
    """Return whether the target has labels of its own: a head of another shape, or declared fresh.

    A head whose rows are copied by label is not of its own, unless a strategy made it fresh.
    """
    rows = [plan[name] for name in plan.possible_head]
    return any(
        row.name in declared
        or (row.source_rows is None and (row.source_shape or row.shape) != row.shape)
        or (row.source_rows is None and drawn[row.name].source_rows is not None)
        for row in rows
    )


def _headless(plan: Plan) -> dict[str, str]:
    """Return parameter -> reason for a head that the source lacks, as an encoder that was saved alone does."""
    rows = [plan[name] for name in plan.possible_head]
    return {row.name: "not among the source's tensors" for row in rows if row.source_shape is None and not row.added}


def _check_merged(source: Source, added: Iterable[str]) -> None:
    """Raise if the source holds parameters that an earlier adaptation added: they would not be copied."""
    if left := [name for name in added if name in source.tensors]:
        raise SourceError(
            f"{source.where} holds {left[0]!r}, which a strategy added to it when it was adapted. Merge it into its "
            "weights first: adaptation.merged() gives a model to adapt from."
        )


def _masks(model: nn.Module) -> set[str]:
    """Return the buffers that may hold infinities by design: all but running statistics."""
    buffers = {canonical(name) for name, _ in unwrap(model).named_buffers()}
    return {name for name in buffers if not name.endswith(("running_mean", "running_var"))}


def _declared(layers: Sequence[Layer], fresh: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return parameter -> reason, for those declared fresh by a glob of parameter or layer names."""
    if isinstance(fresh, str):
        raise SpecError(f"fresh must be a list of globs; received the text {fresh!r}. Write fresh=[{fresh!r}].")
    reasons = fresh if isinstance(fresh, Mapping) else {glob: f"declared fresh by fresh=[{glob!r}]" for glob in fresh}
    inside = {layer.name: [info.name for info in layer.parameters] for layer in layers}
    named = {name for names in inside.values() for name in names}
    if "head" in reasons and "head" not in inside and not any(matches("head", name) for name in named):
        inside["head"] = list(Plan.draw(layers, {}, {}).head)
    globs = [glob for glob in reasons if glob not in inside]
    aliases = {info.name: info.aliases for layer in layers for info in layer.parameters}
    matched = inside | select(globs, list(aliases), aliases=aliases)
    return {name: reason for glob, reason in reasons.items() for name in matched[glob]}
