"""Word classification: recordings of several speakers, one of whom is the target of the adaptation."""

from __future__ import annotations

from conservtl.tasks.audio.espeak import SOURCE_VOICES, TARGET_VOICES
from conservtl.tasks.speech.augment import SpeechAugment
from conservtl.tasks.speech.compact import TCResNet
from conservtl.tasks.speech.corpora import DataSpec, EspeakData, FolderData, SpeechCommandsData, load, speakers
from conservtl.tasks.speech.features import Features, SpeechPreprocessing
from conservtl.tasks.speech.folder import FREE_SPOKEN_DIGITS, SPEECH_COMMANDS
from conservtl.tasks.speech.models import ModelSpec, build
from conservtl.tasks.speech.task import Speech
from conservtl.tasks.speech.torchaudio_adapter import FrameClassifier

__all__ = [
    "FREE_SPOKEN_DIGITS",
    "SOURCE_VOICES",
    "SPEECH_COMMANDS",
    "TARGET_VOICES",
    "DataSpec",
    "EspeakData",
    "Features",
    "FolderData",
    "FrameClassifier",
    "ModelSpec",
    "Speech",
    "SpeechAugment",
    "SpeechCommandsData",
    "SpeechPreprocessing",
    "TCResNet",
    "build",
    "load",
    "speakers",
]
