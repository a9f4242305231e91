"""Utterances of the target that are trained on without their texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from conservtl.bounds import Count, Share
from conservtl.data import Domains, renumber
from conservtl.data.sequences import Sequences, joined
from conservtl.errors import DataError, agreeing, counted
from conservtl.spec_model import FrozenModel
from conservtl.tasks.transcribe.pseudo_labels import pseudo_labelled
from conservtl.tasks.transcribe.recognizers import Decoder
from conservtl.tasks.transcribe.spec_augment import SpecAugment

__all__ = ["Agreement", "PseudoLabels", "Unlabelled", "completed"]


class Agreement(SpecAugment):
    """Changes of the features of an utterance, of which two copies are made; only those that are set."""

    time_masks: Annotated[int, Field(ge=0, le=20)] = 0
    """Number of spans of frames (or samples) that are masked."""
    frequency_masks: Annotated[int, Field(ge=0, le=20)] = 0
    """Number of spans of mel bands that are masked. Log-mel inputs only."""

    @model_validator(mode="after")
    def _changes(self) -> Self:
        if self.waves is not None:
            raise ValueError("waves must be left out: the copies are made of features, not of recordings")
        masks = self.time_masks * self.time_mask + self.frequency_masks * self.frequency_mask
        if not (masks or self.speed or self.noise):
            raise ValueError(
                "agreement must change something, or the copies always agree: set speed, noise, time_masks or "
                "frequency_masks"
            )
        return self


class PseudoLabels(FrozenModel):
    """The source model's hypotheses in the place of texts, where it is confident."""

    least: Share = 0.9
    """Smallest mean posterior of a hypothesis, over the frames of its best path that are no blank."""
    agreement: Agreement | None = None
    """Changes under which two copies of an utterance must give the same hypothesis, such as `{speed: 0.1}`; null: not
    asked. Nothing else changes: masks are made only if their number is set."""


class Unlabelled(FrozenModel):
    """Utterances of the target speaker whose texts are not read."""

    utterances: Count | Literal["all"] = "all"
    """Their number: those that have no text first, then others that are neither shots nor tested on. all: those that
    have no text."""
    pseudo_labels: PseudoLabels | None = PseudoLabels()
    """Hypotheses to train on; null: none, and a strategy such as `entropy_minimisation` learns from the utterances. A
    decoder then reads the source model's hypothesis of each, whatever its posterior."""
    balance: bool = True
    """Whether the shots are repeated in each epoch until they are about as many as these."""


def completed(section: Unlabelled, domains: Domains, source: nn.Module, seed: int) -> Domains:
    """Return the domains with hypotheses for the utterances without texts, and the shots repeated beside them.

    Without pseudo-labels a decoder reads the source model's hypotheses, whose tokens no loss counts: a strategy learns
    from what it answers to them.

    Raises:
        DataError: the source model is sure of no hypothesis, or of none in the target's tokens.

    Reference:
        Kim et al. 2023, "SGEM: Test-time adaptation for automatic speech recognition via sequential-level generalized
        entropy minimization", section 2 (an entropy over the tokens of one hypothesis).
    """
    data: Any = domains.shots
    told = data.take([place for place, known in enumerate(data.labelled) if known])
    bare = data.take([place for place, known in enumerate(data.labelled) if not known])
    note = f"{counted(len(bare), 'utterance')} without their texts"
    heard, counts = bare, {"shots": len(told), "unlabelled": len(bare)}
    if (rule := section.pseudo_labels) is not None:
        augment = None if rule.agreement is None else rule.agreement.of_batch
        heard = pseudo_labelled(source, bare, least=rule.least, augment=augment, seed=seed)
        heard = _numbered(heard, domains)
        note += f", of which {len(heard)} {agreeing(len(heard), 'has')} hypotheses to train on"
        rejected = len(bare) - len(heard)
        note += f"; {rejected} rejected" if rejected else ""
        counts |= {"accepted": len(heard), "rejected": rejected}
    elif isinstance(source, Decoder):
        heard = _numbered(pseudo_labelled(source, bare, least=0.0, seed=seed), domains)
        heard = replace(heard, labelled=(False,) * len(heard))
        note += f", of which the decoder reads {counted(len(heard), 'hypothesis')}"
    times = max(1, round(len(heard) / len(told))) if section.balance and len(told) else 1
    note += f"; the {len(told)} with texts {times} times in an epoch" if times > 1 else ""
    copies = [replace(told, names=tuple(f"{name} ({number})" for name in told.names)) for number in range(2, times + 1)]
    parts: list[Sequences] = [told, *copies, heard] if len(told) else [heard]  # a copy's name draws its own changes
    return replace(domains, shots=joined(parts), notes=(*domains.notes, note), counts=counts)


def _numbered(heard: Sequences, domains: Domains) -> Sequences:
    """Return the source model's hypotheses by the target's numbers, without those of tokens that it does not have.

    Raises:
        DataError: none is left.
    """
    known, own = domains.labels, domains.source_labels or domains.labels
    if known == own:
        return heard
    numbers = [known.index(label) if label in known else -1 for label in own]
    kept = [place for place, labels in enumerate(heard.labels) if min(numbers[token] for token in labels.tolist()) >= 0]
    if not kept:
        raise DataError(
            f"pseudo-labels: at least one of {counted(len(heard), 'hypothesis')} must have only tokens of the target's "
            "vocabulary; none has. Keep the source's tokens (data.tokens), or give texts."
        )
    renumbered: Sequences = renumber(heard.take(kept), numbers)  # type: ignore[assignment]
    return renumbered
