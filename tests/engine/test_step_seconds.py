"""Steps of so many seconds: the mean over their examples, whatever the sizes of the batches."""

from __future__ import annotations

import copy
import os
import signal
import socket

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.data import Sequences
from conservtl.engine.batching import as_batches
from conservtl.engine.buckets import BucketedBatches
from conservtl.functions import cross_entropy

CPU = torch.device("cpu")
SECONDS = [0.4, 0.5, 0.6, 1.5, 1.6, 3.0, 3.1, 3.2, 0.45, 1.55]


class Recognizer(nn.Module):
    """Frames to tokens, with a mean over time beside each frame."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 7)

    def forward(self, inputs, lengths):
        return self.head(self.body(inputs).tanh()), lengths


class Cut(Recognizer):
    """As many frames as the longest label has places."""

    def forward(self, inputs, lengths):
        return super().forward(inputs, lengths)[0][:, : int(inputs.shape[1] // 8) + 1]


def data_of(seconds=SECONDS):
    generator = torch.Generator().manual_seed(0)
    lengths = [round(10 * one) for one in seconds]
    return Sequences(
        tuple(torch.randn(length, 3, generator=generator) for length in lengths),
        tuple(torch.randint(1, 5, (1 + length // 8,), generator=generator) for length in lengths),
        tuple(map(str, range(len(lengths)))),
        (),
        tuple(seconds),
    )


def forward(model, batch):
    return model(batch["inputs"], batch["lengths"])


def ctc(outputs, batch):
    logits, lengths = outputs
    labels = batch["labels"]
    scores = logits.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(scores, labels.clamp_min(0), lengths, (labels >= 0).sum(1))


def trained(strategies=(), whole=False, **options):
    torch.manual_seed(1)
    model = Recognizer()
    source = copy.deepcopy(model)
    with torch.no_grad():
        source.head.weight.add_(0.1)
    data = data_of()
    adaptation = ctl.adapt(model, source, list(strategies))
    settings = {"device": "cpu", "optimizer": "sgd", "lr": 0.05, "batch_size": 100, "epochs": 3, **options}
    if whole:  # one padded batch an epoch
        data = [data.batch(range(len(data)))]
    else:
        settings = {"batch_seconds": 4.0, "step_seconds": 1000.0, **settings}
    ctl.fit(adaptation, data, training=ctl.Training(**settings), forward=forward, loss=ctc, seed=0)
    return adaptation.model


def difference(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_of_unequal_batches_is_that_of_one_batch(clip):
    """By one padded batch of all ten: batches of 4 s hold one to six of them."""
    strategies = [ctl.L2SP(alpha=0.5)]
    ours = trained(strategies, clip=clip)
    assert difference(ours, trained(strategies, clip=clip, whole=True)) < 1e-6
    assert difference(ours, trained(clip=clip, whole=True)) > 1e-4


def test_a_loss_over_positions_weighs_batches_by_these():
    """A class for each of the first frames, which are as many as the labels."""

    results = []
    for whole in (False, True):
        torch.manual_seed(1)
        adaptation = ctl.adapt(model := Cut(), copy.deepcopy(model))
        data = data_of()
        settings = {"batch_seconds": 4.0, "step_seconds": 1000.0, "batch_size": 100}
        given = [data.batch(range(len(data)))] if whole else data
        training = ctl.Training(device="cpu", optimizer="sgd", lr=0.5, epochs=3, **({} if whole else settings))
        ctl.fit(adaptation, given, training=training, forward=forward, loss=cross_entropy, seed=0)
        results.append(adaptation.model)
    assert difference(*results) < 1e-6


def test_terms_are_weighed_by_examples_beside_a_loss_over_positions():
    """One step by hand: the sum of l_i L_i + e_i T_i, with shares l_i of the labels and e_i of the examples."""
    torch.manual_seed(1)
    model = Cut()
    source = copy.deepcopy(model)
    with torch.no_grad():
        source.head.weight.add_(0.3)
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation(weight=0.7, temperature=1.0, padding="count")])
    by_hand, data = copy.deepcopy(model), data_of()
    steps = BucketedBatches(data, 100, 4.0, shuffle=False, step=1000.0).epoch()
    labels = sum(map(len, data.labels))
    for content, _ in steps:
        logits, theirs = (forward(one, content) for one in (by_hand, source))
        counted = (content["labels"] >= 0).sum()
        loss = F.cross_entropy(logits.flatten(0, 1), content["labels"].flatten())
        divergence = F.kl_div(
            logits.log_softmax(-1), theirs.detach().log_softmax(-1), reduction="none", log_target=True
        )
        term = 0.7 * divergence.sum(-1)[content["labels"] >= 0].mean()
        (counted / labels * loss + len(content["names"]) / len(data) * term).backward()
    training = ctl.Training(
        device="cpu", optimizer="sgd", lr=0.5, epochs=1, batch_size=100, batch_seconds=4.0, step_seconds=1000.0
    )
    before = copy.deepcopy(model)
    ctl.fit(adaptation, data, training=training, forward=forward, loss=cross_entropy, seed=0)
    for now, start, hand in zip(model.parameters(), before.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(start - now, 0.5 * hand.grad, rtol=1e-4, atol=1e-6)


def test_no_step_exceeds_its_seconds_and_their_number_is_known():
    data = data_of(SECONDS * 7)
    batches = as_batches(data, 4, CPU, shuffle=True, seconds=6.0, step_seconds=15.0)
    torch.manual_seed(0)
    for _ in range(3):
        steps, seen = list(batches.steps(1)), []
        assert len(steps) == batches.step_count(1)
        for step in steps:
            made = [make() for make in step]
            padded = sum(len(one.content["lengths"]) * int(one.content["lengths"].max()) / 10 for one in made)
            assert padded <= 15.0
            assert sum(one.of_step.examples for one in made) == pytest.approx(1)
            assert sum(one.of_step.labels for one in made) == pytest.approx(1)
            seen += [name for one in made for name in one.content["names"]]
        assert sorted(map(int, seen)) == list(range(70))


def test_an_example_longer_than_a_step_is_a_step_alone():
    batches = BucketedBatches(data_of([0.5, 3.0, 0.5]), 8, None, shuffle=False, step=1.0)
    steps = batches.epoch()
    assert sorted(steps.sizes) == [1, 1]
    assert sorted(len(content["names"]) for content, _ in steps) == [1, 2]


def test_processes_share_a_step(monkeypatch):
    """Shares of all processes add up to their number, whose mean is taken; a stand-in has none."""
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *_: None)
    data = data_of(SECONDS)
    made = [BucketedBatches(data, 4, 4.0, shuffle=False, part=(rank, 2), step=9.0) for rank in range(2)]
    parts = [one.epoch() for one in made]
    assert parts[0].sizes == parts[1].sizes
    assert sum(parts[0].sizes) == len(made[0]) == len(made[1])
    batches = [list(part) for part in parts]
    place = 0
    for size in parts[0].sizes:
        step = [one for part in batches for one in part[place : place + size]]
        assert sum(share.examples for _, share in step) == pytest.approx(2)
        place += size
    names = [name for part in batches for content, share in part if share.examples for name in content["names"]]
    assert sorted(map(int, names)) == list(range(10))


def test_a_run_interrupted_within_a_step_is_resumed(tmp_path):
    """Ctrl-C in the second batch of a step: the step is finished, and the next one continues."""
    calls = []

    def run(stop=None, **options):
        torch.manual_seed(1)
        model = Recognizer()
        adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.L2SP(alpha=0.1)])

        def stopping(model, batch):
            calls.append(batch["names"])
            if stop is not None and len(calls) == stop:
                signal.raise_signal(signal.SIGINT)
            return forward(model, batch)

        calls.clear()
        training = ctl.Training(
            device="cpu", epochs=3, lr=0.01, batch_size=2, batch_seconds=4.0, step_seconds=8.0, schedule="cosine"
        )
        result = ctl.fit(adaptation, data_of(), training=training, forward=stopping, loss=ctc, seed=3, **options)
        return adaptation.model, result.steps, len(calls)

    whole, steps, batches = run()
    assert batches > steps > 3
    with pytest.raises(KeyboardInterrupt):
        run(stop=batches // 3 + 1, out=tmp_path)
    assert len(calls) < batches
    resumed, again, _ = run(out=tmp_path, resume=True)
    assert again == steps
    assert difference(whole, resumed) == 0


def _process(rank, port, folder):
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo")
    model = trained([ctl.L2SP(alpha=0.5)], step_seconds=9.0, clip=0.5)
    torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(side_by_side, tmp_path):
    """Steps of unequal numbers of batches: a process without one makes its pass on a stand-in that does not count."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    side_by_side(_process, (port, str(tmp_path)))
    alone = trained([ctl.L2SP(alpha=0.5)], step_seconds=9.0, clip=0.5).state_dict()
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"rank{rank}.pt").items():
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 2}, "received accumulate=2 too"),
        ({"batch_size": "auto", "global_batch_size": 8}, "received global_batch_size=8 too"),
        ({"batch_seconds": 60.0}, "batch_seconds must be at most step_seconds, 20; received 60"),
    ],
)
def test_settings_that_contradict_it_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ctl.Training(step_seconds=20.0, **options)


def test_data_without_durations_is_refused():
    model = nn.Linear(3, 2)
    adaptation = ctl.adapt(model, copy.deepcopy(model))
    data = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    with pytest.raises(ctl.SpecError, match="step_seconds is 20, but data of type tuple has no durations"):
        ctl.fit(adaptation, data, training=ctl.Training(step_seconds=20.0))
