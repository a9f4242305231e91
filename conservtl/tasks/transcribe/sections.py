"""Specs of utterances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from annotated_types import MinLen
from pydantic import Field, model_validator

from conservtl.bounds import Count, NonNegative, NonNegativeInt, Place, Positive, ProperShare
from conservtl.tasks.audio import espeak
from conservtl.tasks.audio.speakers import Text
from conservtl.tasks.bad_files import FolderFiles
from conservtl.tasks.base import DataSection
from conservtl.tasks.speech.folder import FREE_SPOKEN_DIGITS
from conservtl.tasks.transcribe.beam_search import Decoding, Greedy
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.spec_augment import SpecAugment
from conservtl.tasks.transcribe.text import Normalisation
from conservtl.tasks.transcribe.tokens import Characters, Tokenizer
from conservtl.tasks.transcribe.unlabelled import Unlabelled

__all__ = ["ENGLISH", "AnyData", "CorpusData", "DataSpec", "GrammarData", "StringsData", "UtteranceData"]

ENGLISH = " 'abcdefghijklmnopqrstuvwxyz"
"""The alphabet of English text in lower case."""


class UtteranceData(DataSection):
    """Fields of all kinds of utterances."""

    shots: NonNegativeInt = 10
    """Utterances of the target speaker to adapt with; 0: unlabelled ones alone."""
    unlabelled: Unlabelled | None = None
    """Utterances of the target speaker to train on without their texts, beside the shots or instead of them."""
    validation: ProperShare = 0.0
    """Share of the shots for validation instead of training."""
    features: Features = Features()
    """Conversion of a recording to an input of the network."""
    text: Normalisation = Normalisation()
    """Rules for texts, applied before training and scoring."""
    tokens: Tokenizer = Characters()
    """How a text becomes tokens."""
    decoding: Decoding = Greedy()
    """How outputs become a text: `{kind: greedy}`, or `{kind: beam}` with a lexicon, a language model or both."""
    augment: SpecAugment | None = SpecAugment()
    """Augmentation of the shots during adaptation; null for none."""
    proxies: SpecAugment | None = None
    """Changes that turn the shots into utterances as of other speakers, on which strategies compare the model with the
    source; null: they compare on the shots as augmented. Without `waves`, which change recordings."""
    source_augment: SpecAugment | None = SpecAugment()
    """Augmentation of the source's utterances while a source model is trained; null for none."""

    @model_validator(mode="after")
    def _of_features(self) -> Self:
        if self.proxies is not None and self.proxies.waves is not None:
            raise ValueError(
                "proxies are made of the shots' features, and waves change recordings. Leave proxies.waves out, and "
                "take speed, frequency_stretch, frequency_shift and tilt"
            )
        return self

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.shots == 0 and self.unlabelled is None:
            raise ValueError("shots must be at least 1 without unlabelled utterances; received 0")
        return self

    def preprocessing(self, labels: Sequence[str]) -> TranscribePreprocessing:
        """Return the conversion of files, with the vocabulary in it."""
        tokens: Any = self.tokens
        if isinstance(tokens, Characters):
            tokens = Characters(alphabet="".join(" " if label == "|" else label for label in labels[1:]))
        else:
            tokens = tokens.embedded()
        return TranscribePreprocessing(features=self.features, text=self.text, tokens=tokens, decoding=self.decoding)


class GrammarData(UtteranceData):
    """Sentences of a small grammar, spoken by espeak-ng: numbers, dates, times and commands. No files, no network."""

    kind: Literal["grammar"] = "grammar"
    """Synthetic voices."""
    target: Text = "de+f4"
    """The voice to which the model is adapted."""
    voices: Annotated[tuple[Text, ...], MinLen(1)] = espeak.SOURCE_VOICES
    """The voices of the source model."""
    sentences: Count = 40
    """Sentences of each source voice to train on."""
    held_out: Count = 5
    """Further sentences of each source voice to test on."""
    target_sentences: Count = 60
    """Sentences of the target voice; those that are no shots are tested on."""
    tokens: Tokenizer = Characters(alphabet=ENGLISH)
    """How a text becomes tokens."""
    features: Features = Features(sample_rate=11_025, hop=0.010)
    """Conversion of a recording to an input of the network. A rate of which espeak-ng's 22,050 Hz is a multiple is
    quick to make."""


class CorpusData(UtteranceData, FolderFiles):
    """Utterances in files, in one of the usual layouts."""

    kind: Literal["manifest", "kaldi", "librispeech", "common_voice", "audiofolder"] = "manifest"
    """`manifest`: JSON lines as NeMo writes them (`audio_filepath`, `text`, `speaker`, `duration`, `offset`), CSV or
    TSV (`path`, `text`, `speaker`). `kaldi`: `wav.scp`, `text`, `utt2spk`. `librispeech`; `common_voice`: the folder
    of one language. `audiofolder`: `metadata.csv` beside the recordings, as in Hugging Face's datasets."""
    root: Place
    """The folder."""
    files: tuple[str, ...] = ()
    """Manifests below the folder; empty: all in it. Names with train, dev or test in them are those parts."""
    group: Annotated[str, MinLen(1)] | None = None
    """Column of the lists whose values take the place of the speakers, such as Common Voice's `accents`: `target` is
    then an accent. null: the speakers."""
    target: Text
    """The speaker to whom the model is adapted."""
    source_speakers: Annotated[tuple[Text, ...], MinLen(1)] | None = None
    """The speakers of the source model; null for all but the target."""
    held_out_speakers: tuple[Text, ...] = ()
    """Source speakers to test on only."""
    held_out: ProperShare = 0.1
    """Share of the source's utterances that forms its test part, where the data has no official one."""
    longest: Positive = 30.0
    """Longest utterance in seconds; longer ones are bad."""


class StringsData(UtteranceData, FolderFiles):
    """Strings of words: recordings of single words, joined with gaps."""

    kind: Literal["strings"] = "strings"
    """Recordings of single words in a row."""
    root: Place
    """The folder of recordings; its subfolders are searched too."""
    pattern: str = FREE_SPOKEN_DIGITS
    """Regular expression for the end of a file's path, with the groups `label`, `speaker` and optionally `take`. A
    label that is a number is spoken as its word."""
    target: Text
    """The speaker to whom the model is adapted."""
    source_speakers: Annotated[tuple[Text, ...], MinLen(1)] | None = None
    """The speakers of the source model; null for all but the target."""
    held_out_takes: tuple[NonNegativeInt, ...] = (0, 1, 2, 3, 4)
    """Takes of every speaker of which the strings to test on are made; no others are in them."""
    words: tuple[Count, Count] = (3, 7)
    """Least and largest number of words of a string."""
    gap: tuple[NonNegative, NonNegative] = (0.05, 0.3)
    """Shortest and longest gap between words in seconds."""
    strings: Count = 200
    """Strings of each source speaker to train on."""
    held_out: Count = 50
    """Strings of each source speaker to test on."""
    target_strings: Count = 100
    """Strings of the target speaker to test on."""

    @model_validator(mode="after")
    def _ordered(self) -> StringsData:
        for name in ("words", "gap"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be the lower and the upper bound; received {low} and {high}")
        return self


AnyData = GrammarData | CorpusData | StringsData

DataSpec = Annotated[AnyData, Field(discriminator="kind")]
"""Spec of utterances, selected by ``kind``."""
