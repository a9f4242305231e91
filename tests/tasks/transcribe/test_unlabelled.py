"""Utterances without texts: which they are, what they count in a loss, and hypotheses or entropy to learn from."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.nn import functional as F

import conservtl as ctl
from conservtl.data import Domains
from conservtl.data.sequences import Sequences, joined
from conservtl.experiments.run.runner import run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import prepare_source
from conservtl.experiments.spec.spec import load_spec, parse_spec, with_fields
from conservtl.tasks.transcribe.features import TranscribePreprocessing
from conservtl.tasks.transcribe.task import Transcribe
from conservtl.tasks.transcribe.unlabelled import PseudoLabels, Unlabelled, completed

soundfile = pytest.importorskip("soundfile")
jiwer = pytest.importorskip("jiwer")

RATE = 2000


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two speakers; of the target's ten utterances four have no text."""
    root = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for speaker in ("ann", "cid"):
        for number in range(10):
            name = f"{speaker}{number}.wav"
            soundfile.write(root / name, 0.1 * torch.randn(RATE, generator=generator).numpy(), RATE)
            text = {} if speaker == "cid" and number >= 6 else {"text": ["ab", "b a", "ba"][number % 3]}
            lines.append({"audio_filepath": name, "speaker": speaker, **text})
    (root / "all.json").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture(scope="module")
def fields(root, tmp_path_factory):
    return {
        "task": "transcribe",
        "model": {"args": {"width": 16, "blocks": 1, "heads": 2, "subsampling": 2, "dropout": 0}},
        "data": {
            "kind": "manifest",
            "root": str(root),
            "target": "cid",
            "shots": 2,
            "unlabelled": {"pseudo_labels": {"least": 0}},
            "held_out": 0.3,
            "features": {"sample_rate": RATE, "n_mels": 12, "hop": 0.02},
        },
        "source": {
            "training": {"epochs": 1, "lr": 1e-6, "threads": 1},
            "cache": str(tmp_path_factory.mktemp("cache")),
        },
        "strategies": [],
        "training": {"epochs": 2, "batch_size": 4, "lr": 0.002, "evaluate_every": 2, "threads": 1},
    }


@pytest.fixture(scope="module")
def spec(fields):
    return parse_spec(fields)


class TestWhichOnes:
    """Of a manifest whose target has texts for six of ten utterances."""

    def names(self, spec, **changes):
        domains = prepare(with_fields(spec, changes)).domains
        shots = domains.shots
        told = [name for name, known in zip(shots.names, shots.labelled, strict=True) if known]
        bare = [name for name, known in zip(shots.names, shots.labelled, strict=True) if not known]
        return told, bare, list(domains.target_test.names)

    def test_all_are_those_that_have_no_text(self, spec):
        told, bare, tested = self.names(spec)
        assert bare == [f"cid{number}.wav" for number in range(6, 10)]
        assert len(told) == 2
        assert sorted(told + tested) == [f"cid{number}.wav" for number in range(6)]

    def test_a_number_takes_them_first_and_then_others_that_are_not_tested_on(self, spec):
        told, bare, tested = self.names(spec, **{"data.unlabelled.utterances": 6})
        assert {f"cid{number}.wav" for number in range(6, 10)} < set(bare)
        assert len(bare) == 6
        assert len(tested) == 2
        assert len({*told, *bare, *tested}) == 10
        assert {
            len(one) for one in prepare(with_fields(spec, {"data.unlabelled.utterances": 6})).domains.shots.labels[2:]
        } == {0}
        assert set(self.names(spec, **{"data.unlabelled.utterances": 2})[1]) < set(bare)

    def test_without_shots_they_are_all_there_is(self, spec):
        told, bare, tested = self.names(spec, **{"data.shots": 0})
        assert not told
        assert (len(bare), len(tested)) == (4, 6)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data.unlabelled.utterances": 8}, r"'cid' has 7 utterances that are neither shots.*received 8"),
            ({"data.unlabelled": None}, r"has no text"),
            (
                {"data.target": "ann"},
                r"all takes the target's utterances without a text, and there is none|has no text",
            ),
        ],
    )
    def test_what_is_not_there_is_refused(self, spec, changes, message):
        with pytest.raises(ctl.DataError, match=message):
            prepare(with_fields(spec, changes))

    def test_nothing_to_train_on_is_refused(self, fields):
        data = {**fields["data"], "shots": 0, "unlabelled": None}
        with pytest.raises(ctl.SpecError, match=r"shots must be at least 1 without unlabelled utterances; received 0"):
            parse_spec({**fields, "data": data})


def utterances(count, labelled):
    generator = torch.Generator().manual_seed(count)
    inputs = tuple(torch.randn(8 + number, 3, generator=generator) for number in range(count))
    labels = tuple(torch.tensor([1, 2][: 1 + number % 2]) if known else torch.tensor([], dtype=torch.long)
                   for number, known in enumerate(labelled))  # fmt: skip
    names = tuple(f"u{number}" for number in range(count))
    return Sequences(inputs, labels, names, (), (0.1,) * count, () if all(labelled) else tuple(labelled))


class Heard(torch.nn.Module):
    """Inputs are logits already."""

    def forward(self, inputs, lengths):
        return inputs, lengths


@pytest.mark.parametrize(
    ("labels", "heard"),
    [
        (("<blank>", "a", "b"), [[1, 2], [1]]),  # the source's own
        (("<blank>", "b", "c", "a"), [[3, 1], [3]]),
        (("<blank>", "a", "c"), [[1]]),  # a hypothesis with another token is rejected
        (("<blank>", "c"), None),
    ],
)
def test_hypotheses_have_the_numbers_of_the_targets_tokens(labels, heard):
    """The source model hears "ab" and "a" by <blank>, a, b."""
    scores = tuple(9 * torch.eye(3)[list(path)] for path in ((1, 0, 2), (1, 1)))
    nothing = (torch.tensor([], dtype=torch.long),) * 2
    bare = Sequences(scores, nothing, ("u", "v"), (), (0.1, 0.1), (False, False))
    own = ("<blank>", "a", "b")
    domains = Domains(labels, own, bare, None, bare, None, None, TranscribePreprocessing())
    section = Unlabelled(pseudo_labels={"least": 0.5})
    if heard is None:
        with pytest.raises(ctl.DataError, match=r"of 2 hypotheses must have only tokens of the target's vocabulary"):
            completed(section, domains, Heard(), 0)
        return
    found = completed(section, domains, Heard(), 0)
    assert [one.tolist() for one in found.shots.labels] == heard
    assert found.counts["rejected"] == 2 - len(heard)


class TestLoss:
    task = Transcribe(("<blank>", "a", "b"))

    def loss(self, labelled):
        batch = utterances(3, labelled).batch([0, 1, 2])
        logits = batch["inputs"].requires_grad_()
        return logits, self.task.loss((logits, batch["lengths"]), batch), batch

    def test_those_without_texts_count_as_zero(self):
        """The mean over all utterances, so that each text weighs the same in every batch."""
        logits, found, batch = self.loss([True, False, True])
        losses = [
            F.ctc_loss(logits[n, : batch["lengths"][n]].log_softmax(-1).unsqueeze(1), labels.unsqueeze(0),
                       batch["lengths"][n : n + 1], torch.tensor([1]), reduction="sum")
            for n, labels in ((0, torch.tensor([1])), (2, torch.tensor([1])))
        ]  # fmt: skip
        assert found.item() == pytest.approx(sum(losses).item() / 3, rel=1e-5)
        found.backward()
        assert not logits.grad[1].any()
        assert logits.grad[0].any()

    def test_a_batch_without_texts_has_a_loss_of_zero_that_strategies_can_add_to(self):
        logits, found, _ = self.loss([False] * 3)
        assert (found.item(), found.requires_grad) == (0.0, True)
        found.backward()
        assert not logits.grad.any()


def domains_of(shots):
    parts = dict.fromkeys(("validation", "target_test", "source_train", "source_test", "preprocessing"))
    return Domains(labels=(), source_labels=(), shots=shots, **parts)


class TestHypotheses:
    def completed(self, told, bare, **fields):
        data = (
            joined([utterances(told, [True] * told), utterances(bare, [False] * bare)])
            if told
            else utterances(bare, [False] * bare)
        )
        return completed(Unlabelled(**fields), domains_of(data), Heard(), 0)

    def test_shots_are_repeated_beside_as_many_hypotheses(self):
        found = self.completed(2, 5, pseudo_labels=PseudoLabels(least=0))
        assert found.shots.names == ("u0", "u1", "u0 (2)", "u1 (2)", *(f"u{number}" for number in range(5)))
        assert found.shots.labelled == ()
        assert all(len(one) for one in found.shots.labels)
        (note,) = found.notes
        assert note.startswith("5 utterances without their texts, of which 5 have hypotheses to train on;")
        assert note.endswith("; the 2 with texts 2 times in an epoch")

    def test_or_once_each(self):
        found = self.completed(2, 5, pseudo_labels=PseudoLabels(least=0), balance=False)
        assert len(found.shots) == 7

    def test_without_hypotheses_they_stay_unlabelled(self):
        found = self.completed(2, 4, pseudo_labels=None)
        assert found.shots.labelled == (True,) * 4 + (False,) * 4
        assert found.shots.batch([3, 4])["labelled"].tolist() == [True, False]
        assert found.shots.take([7, 0]).labelled == (False, True)

    def test_nothing_but_hypotheses(self):
        assert len(self.completed(0, 4, pseudo_labels=PseudoLabels(least=0)).shots) == 4


class TestRuns:
    """Through a spec."""

    def test_hypotheses_beside_shots(self, spec, tmp_path):
        report = run(spec, tmp_path)
        notes = [note for note in report["plan"]["notes"] if "without their texts" in note]
        assert len(notes) == 1
        assert "4 utterances without their texts, of which" in notes[0]
        assert "data: 2 utterances with labels and 4 without; 4 utterances to test on" in report["plan"]["notes"]
        found = json.loads((tmp_path / "report.json").read_text())["examples"]
        assert found.pop("accepted") + found.pop("rejected") == 4
        heard = 4 - report["examples"]["rejected"]
        assert heard
        assert found == {"shots": 2, "unlabelled": 4, "target_test": 4, "source_train": 7, "source_test": 3}
        page = (tmp_path / "report.html").read_text()
        labels = f"({heard} pseudo-label{'s' * (heard > 1)} accepted, {4 - heard} rejected)"
        assert f"to cid from 2 utterances and 4 unlabelled utterances {labels}" in page
        said = f"Utterances: 2 to adapt with, 4 unlabelled utterances {labels}, 4 of the target to test on, 7 of the"
        assert said in page

    def test_entropy_alone(self, spec, tmp_path):
        """No text of the target is needed at all."""
        changes = {"data.shots": 0, "data.unlabelled.pseudo_labels": None, "strategies": [{"kind": "suta"}]}
        report = run(with_fields(spec, changes), tmp_path)
        assert report["agreement"]["after"]["kl"] > 0
        assert [line["by"] for line in report["plan"]["terms"]] == ["EntropyMinimisation"]
        assert " cid from 4 unlabelled utterances" in report["sentence"]
        assert "accepted" not in report["sentence"]
        assert report["examples"]["shots"] == 0

    @pytest.mark.parametrize("shots", [0, 2])
    def test_utterances_that_nothing_learns_from_are_refused(self, spec, shots, tmp_path):
        changes = {"data.shots": shots, "data.unlabelled.pseudo_labels": None}
        total = 4 + 2 * shots
        with pytest.raises(ctl.SpecError, match=rf"4 of {total} examples have no labels.*entropy_minimisation"):
            run(with_fields(spec, changes), tmp_path)


class TestRecommended:
    """Before training: what the source model hears, and how much speech there is."""

    def test_error_rates_and_seconds(self, spec, tmp_path):
        found = ctl.recommend(with_fields(spec, {"data.unlabelled": {"pseudo_labels": None}}), range_test=False)
        assert (found.evidence.utterances, found.evidence.unlabelled) == (2, 4)
        assert found.evidence.seconds == pytest.approx(2.0)
        setting, source = prepare_source(spec)
        told = prepare(spec).domains.shots.take([0, 1])
        with torch.no_grad():
            batch = told.batch([0, 1])
            heard = setting.task.heard(source.model(batch["inputs"], batch["lengths"]))
        said = setting.task.texts([one.tolist() for one in told.labels])
        assert found.evidence.target == pytest.approx(jiwer.wer(said, heard))
        assert [one.kind for one in found.strategies][:2] == ["entropy_minimisation", "layer_transfer"]
        assert "word error rate, target" in str(found)
        assert "word error rate" in found._repr_html_()
        assert found.numbers["size"] == "little"
        found.write(tmp_path / "found.yaml")
        assert load_spec(tmp_path / "found.yaml").strategies == found.strategies


class TestAgreement:
    def test_only_what_is_set_changes(self):
        inputs = torch.ones(2, 30, 4)
        found = PseudoLabels(agreement={"noise": 0.5}).agreement
        assert (found.time_masks, found.frequency_masks, found.speed) == (0, 0, 0)
        assert (found(inputs, torch.Generator().manual_seed(0)) != 0).all()
        assert PseudoLabels(agreement={"time_masks": 2}).agreement.time_mask == 0.08

    @pytest.mark.parametrize(
        ("agreement", "message"),
        [
            ({}, "agreement must change something, or the copies always agree: set speed"),
            ({"time_masks": 3, "time_mask": 0}, "must change something"),
            ({"speed": 0.1, "waves": {}}, "waves must be left out: the copies are made of features"),
            ({"sped": 0.1}, r"agreement\.sped: there is no such field. Did you mean 'speed'"),
        ],
    )
    def test_what_changes_nothing_is_refused(self, fields, agreement, message):
        section = {"pseudo_labels": {"agreement": agreement}}
        with pytest.raises(ctl.SpecError, match=rf"data\.unlabelled\.pseudo_labels\.{message}|{message}"):
            parse_spec({**fields, "data": {**fields["data"], "unlabelled": section}})


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_misspelt_target_is_named_before_a_bad_line(root, fields, on_bad):
    (root / "bad.json").write_text('{"audio_filepath": "nowhere.wav", "speaker": "bob", "text": "a"}')
    changed = {**fields["data"], "target": "cidd", "on_bad": on_bad}
    said = "data.target must be a speaker of the data; received 'cidd'. Did you mean 'cid'? Choose one of: 'ann'"
    try:
        with pytest.raises(ctl.DataError, match=f"^{re.escape(said)}"):
            prepare(parse_spec({**fields, "data": changed}))
    finally:
        (root / "bad.json").unlink()


def test_strings_need_a_number(root):
    pattern = r"(?P<speaker>[a-z]+)(?P<label>\d)\.wav"
    data = {"kind": "strings", "root": str(root), "target": "cid", "pattern": pattern, "unlabelled": {}}
    with pytest.raises(ctl.SpecError, match=r"must be a number for kind strings"):
        prepare(parse_spec({"task": "transcribe", "data": data}))


def test_sentences_of_the_grammar_are_taken_from_those_to_test_on():
    data = {"kind": "grammar", "shots": 3, "target_sentences": 12, "voices": ["en-us"], "unlabelled": {"utterances": 5}}
    domains = prepare(parse_spec({"task": "transcribe", "data": data})).domains
    assert domains.shots.labelled == (True,) * 3 + (False,) * 5
    assert len(domains.target_test) == 4
    assert not {*domains.shots.names} & {*domains.target_test.names}
