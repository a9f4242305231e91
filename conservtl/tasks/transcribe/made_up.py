"""Utterances that are made: sentences by synthetic voices, and strings of recorded words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conservtl.data import Domains
from conservtl.errors import SpecError
from conservtl.tasks.audio import espeak
from conservtl.tasks.audio.reading import read_audio
from conservtl.tasks.audio.speakers import check_sources, check_target
from conservtl.tasks.audio.waves import WaveChange
from conservtl.tasks.bad_files import bad_among, explained, names_below
from conservtl.tasks.speech.folder import search
from conservtl.tasks.transcribe.grammar import sentences
from conservtl.tasks.transcribe.recordings import Inputs, SpokenInputs
from conservtl.tasks.transcribe.sections import AnyData, GrammarData, StringsData
from conservtl.tasks.transcribe.spec_augment import SpecAugment
from conservtl.tasks.transcribe.strings import StringInputs, Strung, strings_of
from conservtl.tasks.transcribe.text import Normalisation
from conservtl.tasks.transcribe.utterances import Split, Utterance, sequences, split_utterances

__all__ = ["domains_of", "load_grammar", "load_strings"]

_SLOWER = 3  # quarters of the rate of single words: CTC needs a frame for each letter
_VOICES = 64  # utterances of the source of which a babble is made


def load_grammar(data: GrammarData, seed: int, *, source: bool) -> Domains:
    """Return sentences of a small grammar by synthetic voices; nothing is synthesised yet.

    Raises:
        SpecError: the target is a source voice.
        DataError: there are too few sentences for the shots.
    """
    if data.target in data.voices:
        raise SpecError(
            f"data.voices must not contain data.target; received {data.target!r} in both. Remove it from data.voices."
        )
    spoken: dict[str, espeak.Utterance] = {}
    own = _spoken_by(data.target, data.target_sentences, data.text, spoken)
    train, test = [], []
    for voice in data.voices if source else ():
        said = _spoken_by(voice, data.sentences + data.held_out, data.text, spoken)
        train += said[: data.sentences]
        test += said[data.sentences :]
    wanted = data.unlabelled.utterances if data.unlabelled is not None else 0
    split = split_utterances(
        own, data.target, shots=data.shots, validation=data.validation, seed=seed, unlabelled=wanted
    )
    split = replace(split, source_train=train, source_test=test)
    labels = data.tokens.vocabulary(one.text for one in (*own, *train, *test))
    return domains_of(data, split, labels, lambda chosen: SpokenInputs(chosen, data.features, spoken), source=source)


def load_strings(data: StringsData, seed: int, *, source: bool) -> Domains:
    """Return strings of recorded words; those to test on are made of held-out takes.

    Raises:
        DataError: a speaker or recordings are missing.
    """
    recordings, notes, bad = search(data.root, data.pattern, data.held_out_takes, follow_links=data.follow_links)
    names = sorted({one.speaker for one in recordings})
    check_target(data.target, names, bad)
    check_sources({"data.source_speakers": data.source_speakers or ()}, data.target, names)
    wanted = [name for name in names if name != data.target] if data.source_speakers is None else data.source_speakers
    used = [one for one in recordings if one.speaker in {data.target, *wanted}]
    bad = bad_among(data, bad, (Path(one.name) for one in used), read_audio, "audio")
    recordings = [one for one in recordings if Path(one.name) not in bad]
    strung: dict[Utterance, Strung] = {}

    bare = data.unlabelled.utterances if data.unlabelled is not None else 0
    if bare == "all":
        raise SpecError(
            "data.unlabelled.utterances must be a number for kind strings, which are made as they are needed; received "
            "'all'. Give a number."
        )

    def drawn(speaker: str, part: str, count: int) -> list[Utterance]:
        of_part = [one for one in recordings if one.speaker == speaker and one.held_out == (part == "test")]
        options: Any = {"words": data.words, "gap": data.gap, "text": data.text}
        made = strings_of(of_part, f"{speaker} {part}", count, **options)
        strung.update(made)
        return list(made)

    skipped = names_below(data.root, bad)
    with explained(skipped):
        shots = drawn(data.target, f"shots {seed}", data.shots)
        kept = min(max(round(data.validation * len(shots)), 1), len(shots) - 1) if data.validation else 0
        train = [one for name in wanted for one in drawn(name, "train", data.strings)] if source else []
        test = [one for name in wanted for one in drawn(name, "test", data.held_out)] if source else []
        own = drawn(data.target, "test", data.target_strings)
        heard = drawn(data.target, f"unlabelled {seed}", bare)
    labels = data.tokens.vocabulary(data.text(one.label) for one in recordings)
    untold = [replace(one, text="") for one in heard]
    strung.update({one: strung[told] for one, told in zip(untold, heard, strict=True)})
    split = Split(shots[kept:], shots[:kept], own, train, test, untold)
    made = domains_of(data, split, labels, lambda some: StringInputs(some, data.features, strung), source=source)
    return replace(made, notes=notes, skipped=skipped)


def domains_of(
    data: AnyData,
    split: Split,
    labels: tuple[str, ...],
    inputs: Callable[[Sequence[Utterance]], Inputs],
    *,
    source: bool,
    skipped: Mapping[str, str] | None = None,
) -> Domains:
    """Return the two domains of utterances that are split."""

    def part(chosen: Sequence[Utterance], augment: SpecAugment | None = None) -> Any:
        made = inputs(chosen)
        if augment is not None and augment.waves is not None:
            few = split.source_train[:: -(-len(split.source_train) // _VOICES) or 1]
            made.change = WaveChange(augment.waves, data.features.sample_rate, inputs(few) if few else None)
        encoded = sequences(chosen, made, lambda text: data.tokens.encode(text, labels))
        return encoded if len(encoded) else None

    return Domains(
        labels=labels,
        source_labels=labels,
        shots=part([*split.shots, *split.unlabelled], data.augment),
        validation=part(split.validation),
        target_test=part(split.target_test),
        source_train=part(split.source_train, data.source_augment) if source else None,
        source_test=part(split.source_test) if source else None,
        preprocessing=data.preprocessing(labels),
        augmentation=data.augment,
        source_augmentation=data.source_augment,
        proxies=data.proxies,
        skipped=skipped or {},
        counts={"shots": len(split.shots), "unlabelled": len(split.unlabelled)} if split.unlabelled else {},
    )


def _spoken_by(voice: str, count: int, text: Normalisation, spoken: dict[str, espeak.Utterance]) -> list[Utterance]:
    """Return utterances of a voice; durations are estimates, because nothing is synthesised yet."""
    utterances = []
    for take, sentence in enumerate(sentences(voice, count)):
        (said,) = espeak.takes_of(voice, [sentence], 1)
        said = replace(said, rate=said.rate * _SLOWER // 4)
        name = f"{voice}/{take} {sentence}"
        spoken[name] = said
        utterances.append(Utterance(name, text(sentence), voice, 0.3 + 10.0 * len(sentence) / said.rate))
    return utterances
