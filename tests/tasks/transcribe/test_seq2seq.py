"""Recognizers from sequence to sequence: transformers' Whisper and Speech2Text, small and with random weights."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.run.scoring import in_order, on_source_head
from conservtl.experiments.run.source_labels import check_reader
from conservtl.layers import find_layers
from conservtl.plan.plan import Plan
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.models import ModelSpec, build
from conservtl.tasks.transcribe.recognizers import Decoded, SequenceToSequence
from conservtl.tasks.transcribe.task import Transcribe
from conservtl.tasks.transcribe.unlabelled import Unlabelled, completed

transformers = pytest.importorskip("transformers")

SIZES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_target_positions": 12,
    "init_std": 0.3,
}
NETWORKS = {
    "whisper": (SIZES, Features(kind="whisper", seconds=1)),
    "speech_to_text": ({**SIZES, "conv_channels": 8, "dropout": 0.0}, Features(kind="fbank", n_mels=20)),
}
LABELS = torch.tensor([[1, 2, 3], [4, -100, -100]])


def network(kind, tokens=7, **args):
    sizes, features = NETWORKS[kind]
    torch.manual_seed(0)
    spec = ModelSpec(name=f"transformers/{kind}", args={**sizes, **args})
    return build(spec, TranscribePreprocessing(features=features), tokens).eval()


@pytest.fixture(scope="module", params=NETWORKS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return network(kind)


@pytest.fixture(scope="module")
def batch(kind):
    """Two utterances, the second shorter where the model's lengths say so."""
    bands = NETWORKS[kind][1].n_mels
    inputs = torch.randn(2, 100, bands, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([100, 100 if kind == "whisper" else 63])
    inputs[1, lengths[1] :] = 0
    return {"inputs": inputs, "lengths": lengths, "labels": LABELS, "names": ["a", "b"]}


@torch.no_grad()
def test_logits_are_those_of_the_network_for_shifted_labels(kind, model, batch):
    """The library's own shift: transformers puts the start before the labels, and the end among them."""
    outputs = Transcribe().forward(model, batch)
    assert outputs.logits.shape == (2, 4, 7)
    assert outputs.mask.tolist() == [[True, True, True, True], [True, True, False, False]]
    targets = torch.tensor([[1, 2, 3, 0], [4, 0, -100, -100]])
    for row, length in enumerate(batch["lengths"].tolist()):
        features = batch["inputs"][row : row + 1, :length]
        features = features.transpose(1, 2) if kind == "whisper" else features
        known = targets[row : row + 1, : int(outputs.mask[row].sum())]
        plain = model.network(input_features=features, labels=known)
        torch.testing.assert_close(outputs.logits[row, outputs.mask[row]], plain.logits[0], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_cross_entropy_of_each_utterance(model, batch):
    task = Transcribe()
    outputs = task.forward(model, batch)
    scores = outputs.logits.log_softmax(-1)
    first = -(scores[0, 0, 1] + scores[0, 1, 2] + scores[0, 2, 3] + scores[0, 3, 0]) / 4
    second = -(scores[1, 0, 4] + scores[1, 1, 0]) / 2
    torch.testing.assert_close(task.loss(outputs, batch), (first + second) / 2)


@torch.no_grad()
def test_the_text_generated_is_that_of_the_most_probable_tokens(model, batch):
    """Without a cache: the decoder is run on all tokens so far."""
    heard, posteriors = model.generate(batch["inputs"], batch["lengths"])
    for row in range(2):
        text: list[int] = []
        best = []
        while len(text) < 11:
            known = torch.tensor([text], dtype=torch.long)
            one = {name: batch[name][row : row + 1] for name in ("inputs", "lengths")}
            scores = model(**one, **model.teacher(known)).logits[0, -1].softmax(-1)
            if int(scores.argmax()) == 0:
                break
            text.append(int(scores.argmax()))
            best.append(float(scores.max()))
        assert heard[row][heard[row] >= 0].tolist() == text
        assert float(posteriors[row]) == pytest.approx(sum(best) / max(1, len(best)), abs=1e-4)
    assert model(batch["inputs"], batch["lengths"]).logits.shape == (2, 1, 7)


@torch.no_grad()
def test_tokens_that_are_no_text_are_never_written(kind, batch):
    model = network(kind)
    heard = model.generate(batch["inputs"], batch["lengths"])[0]
    silent = int(heard[0, 0])
    model.tokens = replace(model.tokens, silent=(silent,))
    assert silent not in model.generate(batch["inputs"], batch["lengths"])[0]


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


def test_features_of_encoder_and_decoder_are_compared_without_padding(kind, batch):
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


def test_a_step_with_terms_is_the_same_with_blocks_computed_again(kind):
    """Three utterances: Whisper's 50 positions are no examples of the batch."""
    model, adapted = network(kind), network(kind)
    with torch.no_grad():
        adapted.network.model.decoder.layers[0].fc1.weight += 0.1 * torch.randn(16, 16)
    inputs = torch.randn(3, 100, NETWORKS[kind][1].n_mels)
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


def test_a_growing_vocabulary_keeps_the_rows_of_known_tokens(kind, model, batch):
    new, old = ("<blank>", "c", "g", "|", "a", "h", "b", "d", "e"), ("<blank>", "|", "a", "b", "c", "d", "e")
    grown = network(kind, tokens=9)
    inputs = {name: batch[name] for name in ("inputs", "lengths")}
    ctl.adapt(grown, model, [], labels=(new, old), example=inputs)
    rows, before = (one.network.model.decoder.embed_tokens.weight for one in (grown, model))
    for row, token in enumerate(new):
        if token in old:
            assert torch.equal(rows[row], before[old.index(token)])


@torch.no_grad()
def test_a_grown_decoder_reads_and_answers_the_sources_texts_by_its_own_numbers(kind, model, batch):
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


def test_terms_that_run_the_source_on_texts_of_another_vocabulary_are_refused(kind, model):
    plan = ctl.adapt(network(kind), model, [ctl.OutputConservation(rho=0.1)]).plan
    with pytest.raises(ctl.SpecError, match=r"OutputConservation runs .* must have the same tokens in the same"):
        check_reader(Transcribe(), model, plan)
    check_reader(Transcribe(), torch.nn.Linear(2, 2), plan)  # CTC compares the tokens in common
    check_reader(Transcribe(), model, ctl.adapt(network(kind), model, [ctl.L2SP()]).plan)


def test_sources_texts_of_unknown_tokens_are_not_read(kind, model, batch):
    with pytest.raises(ctl.SpecError, match=r"the source's data must have labels that the adapted .* knows"):
        on_source_head(Transcribe(), None, None).forward(model, batch)


def test_utterances_without_texts_need_hypotheses(kind, model):
    with pytest.raises(ctl.SpecError, match=r"pseudo_labels must be settings for a model with a decoder"):
        completed(Unlabelled(pseudo_labels=None), None, model, 0)


def test_it_learns_four_texts_by_heart(kind):
    """Also in bf16, with the answers of evaluations along the way."""
    model = network(kind, init_std=0.02, d_model=32)
    sizes = [100] * 4 if kind == "whisper" else [100, 80, 70, 60]
    inputs = torch.randn(4, 100, NETWORKS[kind][1].n_mels, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[2, 1, 3], [4, -100, -100], [2, 2, -100], [5, 6, 3]])
    batch = {"inputs": inputs, "lengths": torch.tensor(sizes), "labels": labels, "names": list("abcd")}
    task = Transcribe(("<blank>", *"|abcde"), TranscribePreprocessing())
    training = ctl.Training(epochs=60, batch_size=4, lr=0.01, threads=1, evaluate_every=60, precision="bf16")
    watch = {"target": ctl.Holdout([batch], forward=task.answer)}
    functions = {"forward": task.forward, "loss": task.loss, "metrics": task.metrics}
    example = {name: batch[name] for name in ("inputs", "lengths")}
    adaptation = ctl.adapt(model, network(kind, d_model=32), [], example=example)
    result = ctl.fit(adaptation, [batch], None, training, watch=watch, **functions)
    assert result.history[-1]["target"]["cer"] <= 0.25
    with torch.no_grad():
        said = task.heard(task.answer(model.eval(), batch))
    assert sum(one == other for one, other in zip(said, ["a b", "c", "aa", "deb"], strict=True)) >= 3


@pytest.mark.parametrize("folder", [False, True])
def test_pretrained_weights_are_read_below_the_network(kind, folder, tmp_path):
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


def test_a_shorter_whisper_takes_the_first_positions():
    long, short = network("whisper"), Features(kind="whisper", seconds=2)
    spec = ModelSpec(name="transformers/whisper", args=SIZES)
    longer = build(spec, TranscribePreprocessing(features=short), 7)
    plan = ctl.adapt(long, longer).plan
    rows, whole = (one.network.model.encoder.embed_positions.weight for one in (long, longer))
    assert torch.equal(rows, whole[:50])
    assert any("the first 50 of 100 positions" in note for note in plan.notes)


def test_a_text_without_room_in_the_decoder_is_refused_by_name(model, batch):
    labels = torch.ones(2, 12, dtype=torch.long)
    with pytest.raises(ctl.DataError, match=r"^a: a text must have at most 11 tokens, .* received 12"):
        Transcribe().forward(model, {**batch, "labels": labels})


def test_outputs_in_another_order_renumber_what_was_heard():
    outputs = Decoded(
        torch.arange(4.0).expand(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[3, 1, 0, -100]])
    )
    found = SequenceToSequence().outputs_at(outputs, [3, 0])
    assert found.logits[0, 0].tolist() == [3, 0]
    assert found.heard.tolist() == [[0, 2, 1, -100]]  # 1 is none of them


@pytest.mark.parametrize(
    ("args", "features", "message"),
    [
        ({"dmodel": 4}, {}, r"no field 'dmodel'.*d_model"),
        ({"vocab_size": 99}, {}, r"model.args.vocab_size must be 7, as data says; received 99"),
        ({"d_model": 10, "encoder_attention_heads": 3}, {}, r"model.args: whisper cannot be built"),
        ({}, {"kind": "logmel"}, r"data.features.kind must be 'whisper' for transformers/whisper; received 'logmel'"),
    ],
)
def test_what_cannot_be_built_is_refused(args, features, message):
    spec = ModelSpec(name="transformers/whisper", args=args)
    with pytest.raises(ctl.SpecError, match=message):
        build(spec, TranscribePreprocessing(features=Features(**{"kind": "whisper", **features})), 7)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (Decoded(torch.zeros(2, 3, 5), torch.ones(2, 3)), r"a mask of booleans .* it returns float32 of \(2, 3\)"),
        (Decoded(torch.zeros(2, 5), torch.ones(2, 3)), r"logits of \(N, positions, tokens\); it returns \(2, 5\)"),
        (Decoded(torch.zeros(2, 3, 4), torch.ones(2, 3).bool()), r"for each of 5 tokens, the end among them; it has 4"),
        (Decoded(torch.zeros(2, 3, 5), torch.ones(2, 3).bool()), None),
    ],
)
def test_outputs_of_a_decoder_that_do_not_fit_are_refused(outputs, message):
    fault = Transcribe().fault(outputs, 5)
    assert fault is None if message is None else re.search(message, fault)
