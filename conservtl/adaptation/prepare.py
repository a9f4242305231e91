"""The entry point: ``adapt`` draws up a plan and copies the source's weights; it never trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from conservtl.adaptation._draft import compared_model, declared_fresh, draw, headless_rows
from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.earlier_run import (
    check_extensions_agree,
    inherited_strategies,
    run_note,
    saved_example,
    saved_extensions,
)
from conservtl.adaptation.origin import Origin, Preset, Structure, named_source
from conservtl.errors import SourceError, SpecError, agreeing, counted
from conservtl.layers import canonical, check_globs, find_layers, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.methods import Strategy, apply_all, as_strategies, extend_all, record_all, retract_all, void_notes
from conservtl.plan.decision import Measure
from conservtl.plan.plan import Plan
from conservtl.source.by_label import HeadLabels
from conservtl.source.coverage import check_coverage, kept_note, missed_note, unused_note
from conservtl.source.itself import Itself, check_heads, check_own, own_values
from conservtl.source.kinds import check_kinds, check_model_kinds
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
    fresh: str | Sequence[str] | Mapping[str, str] = (),
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
    ``FeatureExtraction``). Factors and amplitudes that a strategy adds to a frozen module are frozen with it, unless
    their strategy names it (``LoRA(on=["encoder.0"])``) or another does; ``InputTransform`` is a layer of its own in
    front of the model, and is trained. A norm whose parameters are all frozen keeps its running statistics. A parameter
    that is frozen by hand later stays frozen too, unless a phase has frozen it already at that moment: then torch sees
    no change, and a later phase trains it. Freeze before ``adapt`` what no phase is to train.

    Args:
        model: built for the target task, on any device.
        source: a path, a state dict or a model; or a name of weights, such as ``"hf:ORG/NAME@REVISION"``; see
            ``conservtl.source.read_source``. ``ctl.itself()`` for a model that holds pretrained weights already.
        strategies: in any order; none is plain fine-tuning. Or a recipe (``ctl.recipe("vision")``), whose training
            settings are then those of ``adaptation.optimizer()``, ``adaptation.scheduler(steps=...)`` and ``fit``, and
            its treatment of batch norms that of the model.
        example: a batch as the model takes it (a tensor, a tuple of positional or a dictionary of keyword arguments),
            to find the order of layers by running a copy of the model once.
        layers: globs of parameter names, input side first, that define the layers.
        fresh: globs, or one glob, of parameters or layers not to copy although they fit, such as a head for other
            labels; or a mapping glob -> reason, which the plan shows. ``"head"`` means the head, unless a layer or
            parameter is called so; one that is tied to an embedding is refused.
        allow: globs of modules that the model may lack, or build differently, if the source is a model; and of
            parameters that the source may lack, if it has almost none of the model's.
        head: globs of the parameters or modules that are the head. None: the model is asked
            (``get_output_embeddings`` and ``classifier`` of Hugging Face models, ``get_classifier`` of timm's), else it
            is the last weight used. If the model has several outputs from different weights, what needs the head (a
            linear probe, ``FeatureExtraction``) is refused without it. A head tied to an embedding is named by its own
            name, such as ``["proj_out"]``.
        key: the entry of a checkpoint that holds the weights, such as ``"state_dict_ema"``; see
            ``conservtl.source.read_source`` for the order without it.
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
    for name, globs in {"layers": layers, "fresh": fresh, "allow": allow, "head": head}.items():
        check_globs(name, globs, text=name == "fresh")
    head_labels = None if labels is None else HeadLabels(labels)
    training = strategies.training if isinstance(strategies, Preset) else None
    given = strategies.strategies if isinstance(strategies, Preset) else strategies
    chosen = tuple(strategy for strategy in as_strategies(given) if strategy.concerns(unwrap(model)))
    check_model_kinds(model)
    read, missing = _read(model, source, key, prefix, rename)
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
        draft = draw(model, read, parts, missing | declared_fresh(parts, fresh), added, head_labels)
        drawn = record_all(draft.plan, chosen)
        plan = apply_all(drawn, chosen, saved)
        check_extensions_agree(plan, saved, read.where)
        _check_trained(plan)
        _check_source_rows(plan)
        copied = read.as_model_has(draft.resampled)
        headless = headless_rows(plan) if copied.shared is None and copied.module is None else {}
        check_heads(plan, missing | headless)
        if not isinstance(source, Itself):
            check_own(plan, read, model)
        check_coverage(plan, read, own, draft.declared, allow)
        for decision in plan.decisions:
            decision.check(unwrap(model))
        if read.module is not None:
            check_extensions(plan, read.module)
        own_labels = draft.has_own_labels(plan)
        heads = plan.head_modules if own_labels and any(term.heads for term in plan.terms) else ()
        source_model = compared_model(bare, copied, plan, headless, own_labels=own_labels)
    except BaseException:
        retract_all(model, extended)
        raise
    report = transfer(model, parts, plan, draft.values, read)
    known = {name: tensor for name, tensor in own.items() if name not in draft.declared}
    notes = [
        *read.notes,
        *run_note(read),
        *draft.notes,
        *([] if head_labels is None else head_labels.notes(plan)),
        *_adapter_note(model, read),
        *unused_note(report.unused, read.tensors),
        *kept_note(report.kept, own),
        *missed_note(read, known),
        *void_notes(plan),
    ]
    plan = plan.with_notes(notes)
    origin = Origin(drawn, chosen, source_model, heads, inherited, saved, training, structure, named_source(read))
    return Adaptation(model, plan, report, parts, origin)


def _read(
    model: nn.Module, source: SourceLike | Itself, key: str | None, prefix: str | None, rename: Mapping[str, str] | None
) -> tuple[Source, dict[str, str]]:
    """Return the source under the model's names, and parameter -> reason for what a model lacks of itself."""
    missing: dict[str, str] = {}
    if isinstance(source, Itself):
        if key or prefix or rename:
            raise SpecError(
                "key, prefix and rename say how to read a source; the model itself is none. Leave them out."
            )
        source, missing = own_values(model, source)
    return read_source(source, key=key, prefix=prefix, rename=rename).matched(model), missing


def _adapter_note(model: nn.Module, read: Source) -> tuple[str, ...]:
    """Return a remark on factors of PEFT that are not known as such."""
    if not hasattr(unwrap(model), "peft_config") or read.shared is not None:
        return ()
    note = (
        "the model has an adapter of PEFT, whose factors are parameters like others here: conservtl.integrations."
        "peft.adapt takes the model without it as the source, and its L2SP acts on the merged weights"
    )
    return (note,)


def _check_trained(plan: Plan) -> None:
    """Raise if parameters were handed in frozen, and nothing is trained, measured or fitted."""
    own = [row for row in plan.rows if not row.added]
    found = [row for row in own if row.as_found and row.found == "frozen"]
    if plan.trained or plan.searches or not found:
        return
    acts = any(type(measure).use is not Measure.use for measure in plan.measures)
    if not acts and all(type(after).interpolates for after in plan.after):
        rest = "" if len(found) == len(own) else ", and the strategies freeze the others"
        raise SpecError(
            f"model: {len(found)} of its {counted(len(own), 'parameter')} {agreeing(len(found), 'asks')} for no "
            f"gradient (requires_grad is False){rest}, so nothing would be trained. Call requires_grad_(True) on those "
            "to train before adapt, or name them in a strategy, such as LayerTransfer(layers=[...], freeze=False)."
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
