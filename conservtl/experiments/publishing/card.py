"""The card of an adapted model: README.md with the metadata of the Hugging Face Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import SpecError, counted
from conservtl.experiments.publishing.licence import UNKNOWN, base_model, front_matter, licence_of
from conservtl.experiments.run.setting import Setting
from conservtl.plan.plan import Plan
from conservtl.report import left_out_notes, sentence
from conservtl.report.text.metrics import metrics_of, pair

__all__ = ["CARD", "Card", "card_text", "check_card", "run_card"]

_DRIFTED = 8  # layers of the table
_LABELS = 50
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # of a licence on the Hub
_DOMAINS = {"target": "target", "source": "source (retained)"}

CARD = "README.md"
"""Name of a model's card."""
_LOADING = """\
import conservtl as ctl

adapted = ctl.load_adapted(".")  # the folder of this file
print(adapted.predict(["{example}"]))

# the weights alone, for another program:
from safetensors.torch import load_file

weights = load_file("model.safetensors")"""


@dataclass(frozen=True)
class Card:
    """Facts of a card.

    Args:
        title: its heading.
        plan: the decisions.
        strategies: names of the strategies in the order given.
        drift: layer -> |w - w0| / |w0|.
        labels: names of the model's outputs.
        source: name of the source's weights, without folders of this machine.
        base: its repository on the Hub, or None.
        licence: as the source states it, or ``unknown``.
        pipeline: the Hub's name of the task, or None.
        library: that loads the model.
        loading: code that loads it.
        report: metrics before and after by domain, as in ``report.json``; the target's name.
        notes: further sentences.
    """

    title: str
    plan: Plan
    strategies: Sequence[str]
    drift: Mapping[str, float]
    labels: Sequence[str]
    source: str
    base: str | None
    licence: str
    pipeline: str | None
    library: str
    loading: str
    report: Mapping[str, Any]
    notes: Sequence[str] = ()


def card_text(card: Card) -> str:
    """Return the text of README.md."""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(card), sort_keys=False, allow_unicode=True, width=math.inf)}---",
        f"# {_escaped(card.title)}",
        _summary(card),
        *_metrics(card),
        *_done(card),
        f"## Load it\n\n```python\n{card.loading}\n```",
        *_labels(card),
        f"## Licence of the source\n\n{_licence(card.licence)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(card: Card) -> dict[str, Any]:
    known = _IDENTIFIER.fullmatch(card.licence)
    found: dict[str, Any] = (
        {"license": card.licence} if known else {"license": "other", "license_name": _line(card.licence)}
    )
    if card.base is not None:
        found["base_model"] = _line(card.base)
    found["library_name"] = card.library
    found["tags"] = ["conservtl", "domain-adaptation", "transfer-learning", *_kinds(card.strategies)]
    if card.pipeline is not None:
        found["pipeline_tag"] = card.pipeline
    if results := _results(card):
        found["model-index"] = [{"name": _line(card.title), "results": results}]
    return found


def _kinds(strategies: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"[^A-Za-z0-9_-]", "", name) for name in strategies))


def _results(card: Card) -> list[dict[str, Any]]:
    """Return the entries of the Hub's ``model-index``: metrics after adapting, of the target and of the source."""
    results = []
    for domain, shown in _domains(card.report):
        metrics = [
            {"type": _line(metric.key), "name": _line(metric.name), "value": after}
            for metric in metrics_of(card.report, domain)
            if (after := pair(card.report, domain, metric.key).after) is not None
        ]
        if metrics:
            name = _line(card.report.get("target") or shown) if domain == "target" else shown
            task = {"type": card.pipeline or "other"}
            results.append({"task": task, "dataset": {"name": name, "type": domain}, "metrics": metrics})
    return results


def _domains(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the sets with metrics, target and source first, with the text that names each."""
    names = dict.fromkeys([*_DOMAINS, *(report.get("before") or {}), *(report.get("after") or {})])
    return [(name, _DOMAINS.get(name) or _escaped(name)) for name in names]


def _summary(card: Card) -> str:
    totals = card.plan.totals()
    base = f"`{_code(card.base or card.source)}`"
    done = ", ".join(f"`{_code(name)}`" for name in card.strategies) or "plain fine-tuning"
    trained = f"{counted(totals['trained'], 'parameter', of=totals['all'])} trained."
    return "\n\n".join([f"Adapted from {base} by conservtl with {done}. {trained}", *map(_escaped, card.notes)])


def _metrics(card: Card) -> list[str]:
    rows = []
    for domain, shown in _domains(card.report):
        for metric in metrics_of(card.report, domain):
            values = pair(card.report, domain, metric.key)
            name = _escaped(metric.name)
            rows.append(f"| {shown} | {name} | {metric.show(values.before)} | {metric.show(values.after)} |")
    agreement = ((card.report.get("agreement") or {}).get("after") or {}).get("agreement")
    if agreement is not None:
        rows.append(f"| target | answers as the source model | | {100 * agreement:.1f} % |")
    if not rows:
        return ["## Results\n\nNo metrics were given."]
    head = "| domain | metric | before adapting | after |\n| --- | --- | ---: | ---: |"
    target = f"The target is {_escaped(str(card.report['target']))}. " if card.report.get("target") else ""
    told = f"{target}Retained is the same metric on the source's own data."
    return ["## Results\n\n" + told + "\n\n" + "\n".join([head, *rows])]


def _done(card: Card) -> list[str]:
    drift = sorted(card.drift.items(), key=lambda item: -item[1])
    rows = [f"| `{_code(layer)}` | {value:.4g} |" for layer, value in drift[:_DRIFTED]]
    more = f" The {_DRIFTED} largest of {len(drift)} layers:" if len(drift) > _DRIFTED else ""
    table = "\n".join(["| layer | drift |", "| --- | ---: |", *rows])
    plan = str(card.plan.model_copy(update={"notes": ()}))  # notes name files of the data
    plan = plan.replace("```", "'''")
    done = f"## What was done\n\n```\n{plan}\n```"
    return [done, f"Drift is the norm of a layer's change relative to the source's weights.{more}\n\n{table}"]


def _labels(card: Card) -> list[str]:
    if not card.labels:
        return []
    shown = ", ".join(_escaped(label) for label in card.labels[:_LABELS])
    more = f", and {len(card.labels) - _LABELS} more" if len(card.labels) > _LABELS else ""
    return [f"## Labels\n\n{shown}{more}."]


def _licence(licence: str) -> str:
    if licence == UNKNOWN:
        return "unknown: check the source's."
    return f"{_escaped(licence)}, as the source states it. Check the source's own text."


def _escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~>&:@])", r"\\\1", _line(text)).replace("<", "&lt;")


def _line(text: str) -> str:
    """Return a text without line breaks and other signs that are not shown: none can end the metadata."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def _code(text: str) -> str:
    """Return a text for inline code, in one line."""
    return " ".join(str(text).replace("`", "'").replace("|", "/").split())


def check_card(folder: Path) -> None:
    """Raise if a README.md stands in an output folder that is no card of a run."""
    card = folder / CARD
    tags = front_matter(card).get("tags")
    if card.exists() and not (isinstance(tags, list) and "conservtl" in tags):
        raise SpecError(f"out: {str(card)!r} is no card that a run wrote, and a run replaces it. Give another folder.")


def run_card(setting: Setting, adaptation: Adaptation, report: Mapping[str, Any]) -> str:
    """Return the card of the model that a run adapted."""
    section = setting.spec.source
    weights = section.weights
    return card_text(
        Card(
            title=f"{setting.task.name} adapted to {setting.target}",
            plan=adaptation.plan,
            strategies=[strategy.label for strategy in adaptation.origin.strategies],
            drift=adaptation.drift(),
            labels=setting.domains.labels,
            source=section.shown if weights is not None else "a model trained on the source data",
            base=base_model(str(weights)) if isinstance(weights, str) else None,
            licence=UNKNOWN if weights is None else licence_of(weights),
            pipeline=setting.task.pipeline,
            library="conservtl",
            loading=_LOADING.format(example=setting.task.example),
            report=report,
            notes=[sentence(report), *left_out_notes(report)],
        )
    )
