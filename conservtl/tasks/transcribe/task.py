"""The task of transcribing utterances under a change of speaker, accent, room or vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.data import Augmentation, Data, Domains, Preprocessing
from conservtl.errors import DataError
from conservtl.functions import MetricValue
from conservtl.layers import unwrap
from conservtl.tasks.base import Prediction, Task
from conservtl.tasks.fingerprint import digest_of_files
from conservtl.tasks.headline import Headline
from conservtl.tasks.named_target import NamedTarget
from conservtl.tasks.transcribe.corpora import load, speakers
from conservtl.tasks.transcribe.decoding import tokens_of
from conservtl.tasks.transcribe.details import Transcript, error_tables, worst_utterances
from conservtl.tasks.transcribe.features import TranscribePreprocessing
from conservtl.tasks.transcribe.long_recordings import joined_frames, joined_words
from conservtl.tasks.transcribe.models import ModelSpec, build, with_alphabet_of
from conservtl.tasks.transcribe.pretrained_tokens import blank_first
from conservtl.tasks.transcribe.processors import with_architecture, with_processor
from conservtl.tasks.transcribe.recognizers import Decoded, Decoder, answered, recognizer_of
from conservtl.tasks.transcribe.sections import CorpusData, DataSpec
from conservtl.tasks.transcribe.spec_augment import SpecAugment
from conservtl.tasks.transcribe.strings import StringInputs
from conservtl.tasks.transcribe.unlabelled import completed
from conservtl.tasks.transcribe.word_errors import character_errors, word_errors

__all__ = ["Transcribe"]


class Transcribe(NamedTarget, Task):
    """Utterances of several speakers as texts, by CTC or a decoder; judged by the word error rate."""

    name: ClassVar[str] = "transcribe"
    summary: ClassVar[str] = "Speech recognition under a change of speaker, accent, room or vocabulary."
    model_section: ClassVar[Any] = ModelSpec
    data_section: ClassVar[Any] = DataSpec
    preprocessing: ClassVar[Any] = TranscribePreprocessing
    headline: ClassVar[Headline] = Headline("wer", better="lower", text="word error rate")
    example: ClassVar[str] = "utterance"
    labels_are_outputs: ClassVar[bool] = True
    takes: ClassVar[str] = "take (inputs, lengths) and return (logits, lengths), or Decoded"
    shift: ClassVar[Any] = "speaker"
    usual_lr: ClassVar[float] = 5e-4

    def __init__(self, labels: tuple[str, ...] = (), preprocessing: TranscribePreprocessing | None = None) -> None:
        conversion = preprocessing or TranscribePreprocessing()
        self._labels, self._tokens, self._decoding = labels, conversion.tokens, conversion.decoding
        self._text = conversion.text
        self._end = labels.index(end) if (end := self._tokens.end) in labels else 0

    def within(self, labels: tuple[str, ...], preprocessing: Any) -> Transcribe:
        """Return the task with a vocabulary, so that it can write texts.

        Raises:
            DataError: files of the beam search are missing, or do not fit the vocabulary.
        """
        preprocessing.decoding.check(preprocessing.tokens, labels, whole=False)
        return Transcribe(labels, preprocessing)

    def load(self, data: Any, model: Any, *, seed: int, source: bool) -> Domains:
        """Read the utterances of both domains; a bundle of torchaudio brings its characters."""
        data = with_alphabet_of(data, model)
        tokens = data.tokens.embedded()  # its files are read once
        domains = load(data.model_copy(update={"tokens": tokens}), seed=seed, source=source)
        try:
            data.decoding.check(tokens, domains.labels)
        except DataError as error:
            named = re.sub(
                r"(?<!data\.)\bdecoding\.", "data.decoding.", str(error)
            )  # a saved model has no section data
            raise DataError(named) from error
        return domains

    def beside(self, data: Any, weights: Any) -> Any:
        """Return the data with the tokenizer and the features of the weights' processor, where it names none."""
        return with_processor(data, weights)

    def architecture(self, model: Any, weights: Any) -> Any:
        """Return the section with the sizes of the weights' configuration, where it names none."""
        return with_architecture(model, weights)

    def outputs(self, data: Any, labels: tuple[str, ...] | None) -> tuple[tuple[str, ...] | None, ...]:
        """Return the labels of the weights' outputs, or those of their tokenizer, and the same with the blank first."""
        given = data.tokens.order if labels is None else labels
        return given, given and blank_first(given, data.tokens.blank)

    def completed(self, data: Any, domains: Domains, source: nn.Module, *, seed: int) -> Domains:
        """Return the domains with the source model's hypotheses for utterances without texts, if the data asks so."""
        return domains if data.unlabelled is None else completed(data.unlabelled, domains, source, seed)

    def build(self, model: Any, preprocessing: Any, outputs: int) -> nn.Module:
        """Return a network with an output for each token."""
        return build(model, preprocessing, outputs)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return (logits, frames of each utterance) of CTC, or ``Decoded``: a decoder reads the batch's texts.

        Raises:
            DataError: a text is too long for the decoder.
        """
        return model(inputs=batch["inputs"], lengths=batch["lengths"], **_taught(model, batch))

    def answer(self, model: nn.Module, batch: Any) -> Any:
        """Return the outputs, with the text that a decoder generates."""
        if not isinstance(unwrap(model), Decoder):
            return self.forward(model, batch)
        return answered(model, batch["inputs"], batch["lengths"], _taught(model, batch), self._decoding.search)

    def reads_labels(self, model: nn.Module) -> bool:
        """Return whether the model has a decoder."""
        return isinstance(unwrap(model), Decoder)

    def inputs(self, batch: Any) -> Any:
        """Return the model's arguments."""
        return {"inputs": batch["inputs"], "lengths": batch["lengths"]}

    def fault(self, outputs: Any, labels: int) -> str | None:
        """Return why a model is no recognizer with an output for each token; None if it is one."""
        return recognizer_of(outputs).fault(outputs, labels) or self._decoding.fault(outputs)

    def outputs_at(self, outputs: Any, places: Sequence[int]) -> Any:
        """Return the outputs of some tokens."""
        return recognizer_of(outputs).outputs_at(outputs, places)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss a token, of CTC or the cross-entropy of a decoder, the mean over the utterances.

        Those without texts count as 0.

        Raises:
            DataError: a text needs more frames than its utterance has.
        """
        recognizer = recognizer_of(outputs, self._end)
        known = batch.get("labelled")
        if known is None or known.all():
            return recognizer.loss(outputs, batch)
        if not known.any():
            return recognizer.positions(outputs)[0][..., :0].sum()  # 0, with a gradient for what strategies add
        names = [name for name, told in zip(batch["names"], known.tolist(), strict=True) if told]
        share: Tensor = known.float().mean()
        return share * recognizer.loss(
            recognizer.rows(outputs, known), {"labels": batch["labels"][known], "names": names}
        )

    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, MetricValue]:
        """Return wrong words and characters with all of them: word and character error rates."""
        said, heard = self.texts(tokens_of(batch["labels"])), self.heard(outputs)
        words, characters = word_errors(said, heard), character_errors(said, heard)
        return {"wer": (words.wrong, words.count), "cer": (characters.wrong, characters.count)}

    def heard(self, outputs: Any) -> list[str]:
        """Return the text heard in each utterance."""
        return [text for text, _ in self._sure(outputs, self._labels)]

    def _sure(self, outputs: Any, labels: tuple[str, ...]) -> list[tuple[str, float]]:
        """Return the text heard in each utterance, by the rules of the references, and how sure it is."""
        found = self._decoding.texts(outputs, self._tokens, labels)
        return [(self._text(text), sure) for text, sure in found] if self._tokens.free_text else found

    def texts(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of tokens."""
        found = [self._tokens.decode(each, self._labels) for each in tokens]
        return [self._text(text) for text in found] if self._tokens.free_text else found

    def predictions(self, outputs: Any, labels: tuple[str, ...], files: Sequence[Path]) -> list[Prediction]:
        """Return the transcript of each file, and how sure it is, as the way of decoding measures it."""
        return [Prediction(file, *one) for file, one in zip(files, self._sure(outputs, labels), strict=True)]

    def joined(
        self, outputs: Sequence[Any], spans: Sequence[tuple[float, float]], labels: tuple[str, ...], file: Path
    ) -> Prediction:
        """Return the transcript of a long recording: frames of CTC joined, or texts of a decoder."""
        if not any(isinstance(one, Decoded) for one in outputs):
            return self.predictions(joined_frames(outputs, spans), labels, [file])[0]
        found = [self._sure(one, labels)[0] for one in outputs]
        counts = [len(text.split()) for text, _ in found]
        sure = sum(count * one for count, (_, one) in zip(counts, found, strict=True)) / max(1, sum(counts))
        return Prediction(file, joined_words([text for text, _ in found]), sure)

    def agreement(self, outputs: Any, source: Any) -> dict[str, MetricValue]:
        """Return the share of positions with the source model's answer, and KL(source || adapted) a position in nats.

        Positions are frames of CTC, and tokens of the reference for a decoder.
        """
        logits, valid = recognizer_of(outputs, self._end).positions(outputs)
        reference = recognizer_of(source, self._end).positions(source)[0]
        adapted, source = logits[valid].log_softmax(-1), reference[valid].log_softmax(-1)
        kl = F.kl_div(adapted, source, reduction="sum", log_target=True)
        same = (adapted.argmax(-1) == source.argmax(-1)).sum()
        count = int(valid.sum())
        return {"agreement": (int(same), count), "kl": (max(0.0, float(kl)), count)}

    def record(self, outputs: Any, batch: Any) -> Any:
        """Return name, reference and hypothesis of each utterance."""
        return list(zip(batch["names"], self.texts(tokens_of(batch["labels"])), self.heard(outputs), strict=True))

    def errors(self, outputs: Sequence[Any], labels: Sequence[Any], records: Sequence[Any]) -> list[float]:  # noqa: ARG002
        """Return the number of words wrong in each utterance."""
        return [word_errors([said], [heard]).wrong for batch in records for _, said, heard in batch]

    def details(self, before: Mapping[str, Any], after: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return errors by kind, speaker and word, and the worst utterances of the target."""
        found = {}
        for domain, scores in after.items():
            people = dict(zip(data[domain].names, data[domain].groups, strict=True))
            earlier, later = ([one for batch in each.records for one in batch] for each in (before[domain], scores))
            found[domain] = [
                Transcript(name, people[name], said, old, new)
                for (name, said, old), (_, _, new) in zip(earlier, later, strict=True)
            ]
        examples = worst_utterances(found["target"], data["target"])
        return {"tables": error_tables(found), "examples": examples}

    def targets(self, data: Any) -> tuple[str, ...]:
        """Return every speaker found, or the embedded voices."""
        return speakers(data)

    def adopt(self, data: Any, preprocessing: Mapping[str, Any]) -> Any:
        """Return the data with features, rules for texts and tokens of the run that saved the source's weights.

        Taken are those that it leaves out.
        """
        saved, given = TranscribePreprocessing.model_validate(preprocessing), data.model_fields_set
        changed = {name: getattr(saved, name) for name in ("features", "text", "tokens") if name not in given}
        if data.tokens == saved.tokens.model_copy(update={"alphabet": None}):
            changed["tokens"] = saved.tokens
        return data.model_copy(update=changed)

    def augmented(self, augmentation: Augmentation | None) -> Callable[[Any, torch.Generator], Any] | None:
        """Return the augmentation of a padded batch; None: no augmentation."""
        if augmentation is None:
            return None
        augment: SpecAugment = augmentation  # type: ignore[assignment]
        return augment.of_batch

    def fingerprint(self, data: Any, train: Data, preprocessing: Preprocessing) -> Any:
        """Return names and texts of the source's utterances, sizes and times of their files, and gaps of strings."""
        names, labels = getattr(train, "names", ()), [one.tolist() for one in getattr(train, "labels", ())]
        files = [data.root / name.partition("@")[0] for name in names] if isinstance(data, CorpusData) else []
        inputs = getattr(train, "inputs", None)
        gaps = inputs.gaps if isinstance(inputs, StringInputs) else []
        files += inputs.files if isinstance(inputs, StringInputs) else []
        waves = None if data.source_augment is None else data.source_augment.waves
        files += waves.files if waves else []
        fields = preprocessing.model_dump(mode="json")
        conversion = {name: fields[name] for name in fields if name not in TranscribePreprocessing.of_outputs}
        return [data.kind, list(names), labels, digest_of_files(files), conversion, *gaps]


def _taught(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return the arguments by which a decoder reads the batch's texts; none for CTC, or without texts."""
    bare, labels = unwrap(model), batch.get("labels")
    if not isinstance(bare, Decoder) or labels is None:
        return {}
    try:
        return bare.teacher(labels)
    except DataError as error:
        longest = int((labels >= 0).sum(1).argmax())
        raise DataError(f"{batch['names'][longest]}: {error}") from error
