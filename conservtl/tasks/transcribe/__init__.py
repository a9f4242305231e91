"""Speech recognition: utterances of several speakers as texts, one of the speakers the target of the adaptation."""

from __future__ import annotations

from conservtl.tasks.transcribe.conformer import ConformerArgs, ConformerCTC
from conservtl.tasks.transcribe.corpora import load, speakers
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.models import ModelSpec, build
from conservtl.tasks.transcribe.recognizers import Decoded, Decoder
from conservtl.tasks.transcribe.sections import CorpusData, DataSpec, GrammarData, StringsData
from conservtl.tasks.transcribe.spec_augment import SpecAugment
from conservtl.tasks.transcribe.task import Transcribe
from conservtl.tasks.transcribe.text import Normalisation

__all__ = [
    "ConformerArgs",
    "ConformerCTC",
    "CorpusData",
    "DataSpec",
    "Decoded",
    "Decoder",
    "Features",
    "GrammarData",
    "ModelSpec",
    "Normalisation",
    "SpecAugment",
    "StringsData",
    "Transcribe",
    "TranscribePreprocessing",
    "build",
    "load",
    "speakers",
]
