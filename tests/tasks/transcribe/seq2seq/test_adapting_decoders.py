"""Whisper and Speech2Text under strategies: terms, layers, weights and vocabularies."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import conservtl as ctl
from conservtl.data import Domains, Sequences
from conservtl.experiments.run.scoring import in_order, on_source_head
from conservtl.experiments.run.source_labels import check_reader
from conservtl.layers import find_layers
from conservtl.plan.plan import Plan
from conservtl.tasks.transcribe.features import TranscribePreprocessing
from conservtl.tasks.transcribe.task import Transcribe
from conservtl.tasks.transcribe.unlabelled import Unlabelled, completed

pytest.importorskip("transformers")


def test_output_conservation_is_the_mean_kl_over_target_tokens(model, batch):
    task = Transcribe()
    adapted = copy.deepcopy(model)
    adaptation = ctl.adapt(adapted, model, [ctl.OutputConservation(weight=1.0, temperature=1.0)])
    with torch.no_grad():
        adapted.network.model.decoder.layers[0].fc1.weight += torch.randn(16, 16)
    with torch.no_grad():
        source = task.forward(model, batch)
    outputs = task.forward(adapted, batch)
    loss = task.loss(outputs, batch)
    view = adaptation.source_view(batch, task.forward)
    total = adaptation.loss(loss, outputs, source=view, batch=batch)
    after, before = outputs.logits[outputs.mask].log_softmax(-1), source.logits[source.mask].log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean().detach()
    assert outputs.mask.sum() == 6
    assert float(expected) > 1e-6
    torch.testing.assert_close((total - loss).detach(), expected)
    with torch.no_grad():
        found = task.agreement(outputs, source)
    assert found["kl"] == (pytest.approx(6 * float(expected), rel=1e-4), 6)


def test_features_of_encoder_and_decoder_are_compared_without_padding(kind, batch, network):
    model = network(kind)
    adapted = copy.deepcopy(model)
    adaptation = ctl.adapt(adapted, model, [ctl.FeatureConservation(alpha=1.0)])
    with torch.no_grad():
        adapted.network.model.encoder.layers[0].fc1.weight += torch.randn(16, 16)
    task = Transcribe()

    def added(content):
        outputs = task.forward(adapted, content)
        loss = task.loss(outputs, content)
        view = adaptation.source_view(content, task.forward)
        return float((adaptation.loss(loss, outputs, source=view, batch=content) - loss).detach())

    again = {**batch, "inputs": batch["inputs"].clone()}
    again["inputs"][1, batch["lengths"][1] :] = 3.0  # padding may be anything
    assert added(batch) > 0
    assert added(again) == pytest.approx(added(batch), rel=1e-4)


def test_a_step_with_terms_is_the_same_with_blocks_computed_again(kind, bands, network):
    """Three utterances: Whisper's 50 positions are no examples of the batch."""
    model, adapted = network(kind), network(kind)
    with torch.no_grad():
        adapted.network.model.decoder.layers[0].fc1.weight += 0.1 * torch.randn(16, 16)
    inputs = torch.randn(3, 100, bands)
    lengths = torch.tensor([100, 100, 100] if kind == "whisper" else [100, 63, 40])
    labels = torch.tensor([[1, 2, 3], [4, -100, -100], [5, 5, -100]])
    batch = {"inputs": inputs, "lengths": lengths, "labels": labels, "names": ["a", "b", "c"]}
    task = Transcribe()
    strategies = [ctl.OutputConservation(rho=0.3), ctl.FeatureConservation(alpha=0.1)]
    steps = {}
    for again in (False, True):
        trained = copy.deepcopy(adapted)
        training = ctl.Training(epochs=1, batch_size=3, lr=0.1, optimizer="sgd", threads=1, checkpointing=again)
        functions = {"forward": task.forward, "loss": task.loss, "metrics": lambda *_: {}}
        ctl.fit(ctl.adapt(trained, model, strategies), [batch], None, training, **functions)
        steps[again] = trained.state_dict()
    for name, value in steps[False].items():
        torch.testing.assert_close(steps[True][name], value, rtol=1e-4, atol=1e-6)
    name = "network.model.decoder.layers.0.fc1.weight"
    assert not torch.equal(steps[False][name], adapted.state_dict()[name])


def test_layers_run_from_the_encoder_to_the_decoder(kind, model, batch):
    inputs = {name: batch[name] for name in ("inputs", "lengths")}
    layers = find_layers(model, inputs)
    names = [layer.name.removeprefix("network.model.") for layer in layers]
    first = ["encoder.conv1", "encoder.conv2", "encoder.embed_positions"]
    first = first if kind == "whisper" else [f"encoder.conv.conv_layers.{place}" for place in (0, 1)]
    blocks = [f"encoder.layers.{place}" for place in (0, 1)]
    assert names == [*first, *blocks, "decoder.embed_tokens", *(f"decoder.layers.{place}" for place in (0, 1))]
    assert Plan.draw(layers, {}, {}).head == ("network.model.decoder.embed_tokens.weight",)  # tied to the outputs


def test_a_growing_vocabulary_keeps_the_rows_of_known_tokens(kind, model, batch, network):
    new, old = ("<blank>", "c", "g", "|", "a", "h", "b", "d", "e"), ("<blank>", "|", "a", "b", "c", "d", "e")
    grown = network(kind, tokens=9)
    inputs = {name: batch[name] for name in ("inputs", "lengths")}
    ctl.adapt(grown, model, [], labels=(new, old), example=inputs)
    rows, before = (one.network.model.decoder.embed_tokens.weight for one in (grown, model))
    for row, token in enumerate(new):
        if token in old:
            assert torch.equal(rows[row], before[old.index(token)])


@torch.no_grad()
def test_a_grown_decoder_reads_and_answers_the_sources_texts_by_its_own_numbers(kind, model, batch, network):
    new, old = ("<blank>", "c", "g", "|", "a", "h", "b", "d", "e"), ("<blank>", "|", "a", "b", "c", "d", "e")
    grown = network(kind, tokens=9)
    inputs = {name: batch[name] for name in ("inputs", "lengths")}
    ctl.adapt(grown, model, [], labels=(new, old), example=inputs)
    order = [new.index(token) for token in old] + [new.index(token) for token in new if token not in old]
    task = Transcribe(old, TranscribePreprocessing())
    found = in_order(task, None, order).forward(grown, batch)
    expected = task.answer(model, batch)
    torch.testing.assert_close(found.logits[..., :7], expected.logits, rtol=1e-4, atol=1e-5)
    own = grown.generate(batch["inputs"], batch["lengths"])[0]
    back = {place: number for number, place in enumerate(order)}
    assert found.heard.tolist() == [[back.get(token, -100) for token in row] for row in own.tolist()]
    assert len(task.heard(found)) == 2


def test_terms_that_run_the_source_on_texts_of_another_vocabulary_are_refused(kind, model, network):
    plan = ctl.adapt(network(kind), model, [ctl.OutputConservation(rho=0.1)]).plan
    with pytest.raises(ctl.SpecError, match=r"OutputConservation runs .* must have the same tokens in the same"):
        check_reader(Transcribe(), model, plan)
    check_reader(Transcribe(), torch.nn.Linear(2, 2), plan)  # CTC compares the tokens in common
    check_reader(Transcribe(), model, ctl.adapt(network(kind), model, [ctl.L2SP()]).plan)


def test_sources_texts_of_unknown_tokens_are_not_read(kind, model, batch):
    with pytest.raises(ctl.SpecError, match=r"the source's data must have labels that the adapted .* knows"):
        on_source_head(Transcribe(), None, None).forward(model, batch)


def test_utterances_without_texts_are_learned_from_by_the_entropy_over_their_hypotheses(model, batch):
    """SUTA over the tokens of each hypothesis and its end, written out; the loss counts none of them."""
    inputs = tuple(row[:length] for row, length in zip(batch["inputs"], batch["lengths"].tolist(), strict=True))
    bare = tuple(torch.empty(0, dtype=torch.long) for _ in inputs)
    data = Sequences(inputs, bare, ("a", "b"), (), (1.0, 1.0), labelled=(False, False))
    parts = dict.fromkeys(("validation", "target_test", "source_train", "source_test", "preprocessing"))
    domains = Domains(labels=(), source_labels=(), shots=data, **parts)
    found = completed(Unlabelled(pseudo_labels=None), domains, model, 0)
    heard = model.generate(batch["inputs"], batch["lengths"])[0]
    assert found.shots.labelled == (False, False)
    assert [one.tolist() for one in found.shots.labels] == [row[row >= 0].tolist() for row in heard]
    assert "the decoder reads 2 hypotheses" in found.notes[0]
    given, task = found.shots.batch([0, 1]), Transcribe()
    outputs = task.forward(model, given)
    loss = task.loss(outputs, given)
    assert loss.item() == 0
    adaptation = ctl.adapt(
        copy.deepcopy(model), model, [ctl.EntropyMinimisation(weight=0.5, entropy=0.4, temperature=2)]
    )
    values = []
    for logits, row in zip(outputs.logits, heard, strict=True):
        p = (logits[: len(row[row >= 0]) + 1] / 2).softmax(-1)
        shared = p.T @ p
        confused = 1 - (shared.diagonal() / shared.sum(1)).mean()
        values.append(0.4 * -(p * p.log()).sum(1).mean() + 0.6 * confused)
    expected = 0.5 * torch.stack(values).mean()
    torch.testing.assert_close(adaptation.loss(loss, outputs, batch=given), expected)


@pytest.mark.parametrize("strategy", [ctl.EntropyMinimisation(blank=0), ctl.OutputConservation(weight=1.0, blank=0)])
def test_a_decoder_has_no_blank(model, batch, strategy):
    adaptation = ctl.adapt(copy.deepcopy(model), model, [strategy])
    task = Transcribe()
    outputs = task.forward(adaptation.model, batch)
    view = adaptation.source_view(batch, task.forward)
    with pytest.raises(ctl.SpecError, match=r"blank is an output of CTC, and a decoder has none; received 0"):
        adaptation.loss(task.loss(outputs, batch), outputs, source=view, batch=batch)


def test_it_learns_four_texts_by_heart(kind, bands, network):
    """With the answers of evaluations along the way; then a step in bf16."""
    model = network(kind, init_std=0.02, d_model=32)
    sizes = [100] * 4 if kind == "whisper" else [100, 80, 70, 60]
    inputs = torch.randn(4, 100, bands, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[2, 1, 3], [4, -100, -100], [2, 2, -100], [5, 6, 3]])
    batch = {"inputs": inputs, "lengths": torch.tensor(sizes), "labels": labels, "names": list("abcd")}
    task = Transcribe(("<blank>", *"|abcde"), TranscribePreprocessing())
    training = ctl.Training(epochs=60, batch_size=4, lr=0.01, threads=1, evaluate_every=60)
    watch = {"target": ctl.Holdout([batch], forward=task.answer)}
    functions = {"forward": task.forward, "loss": task.loss, "metrics": task.metrics}
    example = {name: batch[name] for name in ("inputs", "lengths")}
    adaptation = ctl.adapt(model, network(kind, d_model=32), [], example=example)
    result = ctl.fit(adaptation, [batch], None, training, watch=watch, **functions)
    assert result.history[-1]["target"]["cer"] <= 0.25
    with torch.no_grad():
        said = task.heard(task.answer(model.eval(), batch))
    assert sum(one == other for one, other in zip(said, ["a b", "c", "aa", "deb"], strict=True)) >= 3
    half = training.model_copy(update={"precision": "bf16", "epochs": 1, "evaluate_every": 1})
    adaptation = ctl.adapt(model, network(kind, d_model=32), [], example=example, fresh=["*"])
    assert math.isfinite(
        ctl.fit(adaptation, [batch], None, half, watch=watch, **functions).history[-1]["target"]["loss"]
    )


@pytest.mark.parametrize("folder", [False, True])
def test_pretrained_weights_are_read_below_the_network(kind, folder, tmp_path, network):
    """A file of tied weights holds them once."""
    model, other = network(kind), network(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    if folder:
        other.network.save_pretrained(tmp_path)
    plan = ctl.adapt(model, tmp_path if folder else other.network).plan
    assert {row.origin for row in plan.rows} == {"source"}
    state, given = model.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], given[name]) for name in state)


def test_a_shorter_whisper_takes_the_first_positions(network):
    short, long = network("whisper"), network("whisper", seconds=2)
    plan = ctl.adapt(short, long).plan
    rows, whole = (one.network.model.encoder.embed_positions.weight for one in (short, long))
    assert torch.equal(rows, whole[:50])
    assert any("the first 50 of 100 positions" in note for note in plan.notes)
