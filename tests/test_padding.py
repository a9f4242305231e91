"""Padding: found by name, refused where it cannot be, and left out of whatever compares or measures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.padding import completed, find_padding, padding_of_outputs
from conservtl.runtime.padding_watch import PaddingWatch

LENGTHS = torch.tensor([3, 5])
X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))  # utterances of 3 and 5 frames
X[0, 3:] = 0
VALID = torch.arange(5) < LENGTHS[:, None]


def padded(x, times=10):
    """The same utterances, padded until they are so many times longer."""
    return torch.cat([x, x.new_zeros(len(x), (times - 1) * x.shape[1], *x.shape[2:])], 1)


class TestFinding:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"lengths": LENGTHS},
            {"input_lengths": LENGTHS.int()},
            {"lengths": LENGTHS.float()},
            {"wav_lens": LENGTHS / 5},
            {"lengths": [3, 5]},
            {"attention_mask": VALID},
            {"attention_mask": VALID.long()},
            {"mask": VALID},
            {"padding_mask": ~VALID},
            {"src_key_padding_mask": torch.zeros(2, 5).masked_fill(~VALID, -torch.inf)},
        ],
    )
    def test_every_way_says_the_same(self, arguments):
        found = find_padding({"inputs": X, **arguments})
        assert torch.equal(found.mask((2, 5, 7), 2, "it"), VALID)
        assert torch.equal(found.mask((2, 7, 5), 1, "it"), VALID)
        assert found.mask((2, 7), 1, "it") is None

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"label_lengths": LENGTHS},
            {"target_lengths": LENGTHS},
            {"max_length": 5},
            {"attention_mask": torch.ones(2, 1, 5, 5)},
            {"decoder_attention_mask": VALID},
            {"head_mask": VALID},
        ],
    )
    def test_other_arguments_say_nothing(self, arguments):
        assert find_padding({"inputs": X, **arguments}) is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"lengths": torch.tensor([3])}, r"'lengths' must hold one length for each example; .*\(1,\) for 2"),
            ({"lengths": torch.tensor([0, 5])}, r"'lengths' must be integers from 1 .* received 0 to 5"),
            ({"lengths": torch.tensor([3, 9])}, r"'lengths' must be from 1 to the number of positions .* up to 9"),
            ({"lengths": torch.tensor([0.5, 1.5])}, r"'lengths' must be integers .* received 0.5 to 1.5"),
            ({"lengths": torch.tensor([0.0, 1.0])}, r"'lengths' must be integers .* received 0 to 1"),
            ({"attention_mask": torch.full((2, 5), 0.5)}, r"'attention_mask' must hold booleans"),
            ({"attention_mask": torch.zeros(2, 5)}, r"'attention_mask' must leave each example a position"),
            (
                {"mask": torch.tensor([[False, True, True, True, True]] * 2)},
                r"'mask' must be true for .* padding_mask if true",
            ),
        ],
    )
    def test_what_contradicts_the_inputs_is_refused_where_it_is_used(self, arguments, message):
        found = find_padding({"inputs": X, **arguments})
        assert found.mask((2, 7), 1, "it") is None
        with pytest.raises(ctl.SpecError, match=f"^it: {message}"):
            found.mask((2, 5, 7), 2, "it")

    def test_examples_padded_at_the_left(self):
        found = find_padding({"inputs": X, "attention_mask": VALID.flip(1)})
        assert torch.equal(found.mask((2, 5, 7), 2, "it"), VALID.flip(1))

    @pytest.mark.parametrize("outputs", [(X, LENGTHS), {"logits": X, "lengths": LENGTHS}, (X, VALID), (X, LENGTHS / 5)])
    def test_outputs_may_say_it(self, outputs):
        assert torch.equal(padding_of_outputs(outputs).mask(X.shape, 2, "it"), VALID)

    @pytest.mark.parametrize("outputs", [X, (X, X), (X[:, 0], LENGTHS), {"logits": X}, (X, None), "text", ()])
    def test_or_not(self, outputs):
        assert padding_of_outputs(outputs) is None


class Strided(nn.Module):
    """Frames through convolutions and a pooling with strides, and a shortcut beside one of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 4, 3, stride=2, padding=1)
        self.shortcut = nn.Conv1d(4, 4, 1, stride=2)
        self.pool = nn.MaxPool1d(2, ceil_mode=True)
        self.last = nn.Conv1d(4, 4, 2, dilation=2)

    def forward(self, inputs, lengths=None):
        x = inputs.transpose(1, 2)
        return self.last(self.pool(self.first(x) + self.shortcut(x)))


def test_positions_behind_strides_are_counted_by_their_arithmetic():
    """As many frames as a model gives for the utterance without padding."""
    model = Strided()
    for length in (9, 10, 11, 12, 13, 50):
        alone = model(torch.randn(1, length, 4)).shape[2]
        x = torch.randn(2, 61, 4)
        with PaddingWatch(model) as watch:
            frames = model(x, torch.tensor([length, 61])).shape[2]
        mask = watch.padding.mask((2, 4, frames), 1, "it")
        assert mask.sum(1).tolist() == [alone, frames]


def test_positions_are_followed_into_each_of_two_branches():
    """A convolution and a pooling of the same 11 frames give 6 and 5; of 7 they give 4 and 3."""
    conv, pool = nn.Conv1d(4, 4, 3, stride=2, padding=1), nn.AvgPool1d(2)
    model = nn.ModuleDict({"conv": conv, "pool": pool})
    model.forward = lambda inputs, lengths: (conv(inputs.transpose(1, 2)), pool(inputs.transpose(1, 2)))
    with PaddingWatch(model) as watch:
        model(inputs=torch.randn(2, 11, 4), lengths=torch.tensor([7, 11]))
    for frames, short in ((6, 4), (5, 3)):
        assert watch.padding.mask((2, 4, frames), 1, "it").sum(1).tolist() == [short, frames]


def test_shares_are_of_the_axis_that_a_layer_shares_with_the_inputs():
    """Shares 1/2 and 1 are whole numbers of 20 and of 30 positions."""
    shares = torch.tensor([0.5, 1.0])
    padding = find_padding({"x": torch.zeros(2, 20, 30), "lengths": shares}, ("x", "lengths"))
    for size in (20, 30):
        mask = padding.mask((2, 16, size), 1, "a layer")
        assert mask.sum(1).tolist() == [size // 2, size]
    with pytest.raises(ctl.SpecError, match=r"shares of 20 or 30 positions, and which axis of shape \(2, 16, 20, 30\)"):
        padding.mask((2, 16, 20, 30), 1, "a layer")
    whole = find_padding({"x": torch.zeros(2, 20, 30), "lengths": torch.ones(2)}, ("x", "lengths"))
    assert whole.mask((2, 16, 20, 30), 1, "a layer").all()
    known = find_padding({"x": torch.zeros(1, 20, 30), "lengths": torch.tensor([7 / 30])}, ("x", "lengths"))
    both = known.joined([known, padding])
    assert both.mask((3, 16, 30), 1, "a layer").sum(1).tolist() == [7, 15, 30]


def test_positions_that_follow_in_no_known_way_are_refused():
    found = find_padding({"inputs": X, "lengths": LENGTHS})
    with pytest.raises(ctl.SpecError, match=r"it: padding must be left out, .* \(2, 3, 7\) .* of 5 is not known"):
        found.mask((2, 3, 7), 2, "it")
    assert found.mask((2, 10, 7), 2, "it").sum(1).tolist() == [6, 10]


@pytest.mark.parametrize("shape", [(1, 5, 7), (5, 7)])
def test_positions_alike_for_all_examples_count_where_one_has_them(shape):
    """Embeddings of positions have no axis of examples, or one of size 1."""
    found = find_padding({"inputs": X, "lengths": torch.tensor([1, 3])})
    assert found.mask(shape, len(shape) - 1, "it").flatten().tolist() == [True] * 3 + [False] * 2


def test_a_decoders_padding_may_stand_in_labels_that_the_model_did_not_get():
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    arguments = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 4).long()}
    arguments["decoder_input_ids"] = torch.ones(2, 3).long()
    found = find_padding(arguments)
    assert found.of_layer("decoder.layers.0") is None
    found = completed(found, {**arguments, "labels": labels})
    assert found.of_layer("decoder.layers.0").lengths.tolist() == [2, 1]
    assert found.of_layer("encoder.layers.0").lengths.tolist() == [4, 4]


class Frames(nn.Module):
    """A classifier of frames or, pooled, of utterances, which gets lengths."""

    def __init__(self, *, pooled=False, lengths=False, norm=False, classes=3):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.act = nn.Tanh()
        self.head = nn.Linear(6, classes)
        self.pooled, self.with_lengths = pooled, lengths

    def forward(self, inputs, lengths=None):
        x = self.act(self.norm(self.body(inputs).transpose(1, 2)).transpose(1, 2))
        if self.pooled:
            mask = (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
            x = (x * mask).sum(1) / lengths[:, None]
        logits = self.head(x)
        return (logits, lengths) if self.with_lengths else logits


def frames(seed, **options):
    torch.manual_seed(seed)
    return Frames(**options)


def adapted(*chosen, model=None, source=None, **options):
    model = frames(1, **options) if model is None else model
    adaptation = ctl.adapt(model, frames(0, **options) if source is None else source, list(chosen))
    with torch.no_grad():
        for parameter in adaptation.model.parameters():
            parameter.add_(0.2)
    return adaptation.model.eval() and adaptation


def term(adaptation, x, lengths=LENGTHS, **more):
    outputs = adaptation.model(x, lengths)
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    task = F.cross_entropy(logits.flatten(0, -2), torch.zeros(logits[..., 0].numel()).long())
    return adaptation.loss(task, outputs, (x, lengths), **more) - task


TERMS = [
    ctl.OutputConservation(weight=1.0, temperature=1.0),
    ctl.FeatureConservation(metric="delta", alpha=1.0, layers=2),
    ctl.FeatureConservation(metric="ldifs", alpha=1.0, layers=2),
]


class TestTerms:
    @pytest.mark.parametrize("chosen", TERMS)
    @pytest.mark.parametrize("pooled", [False, True])
    def test_ten_times_more_padding_changes_no_term(self, chosen, pooled):
        adaptation = adapted(chosen, pooled=pooled)
        short, long = (term(adaptation, x) for x in (X, padded(X)))
        assert short.item() > 1e-3
        torch.testing.assert_close(short, long)

    @pytest.mark.parametrize("chosen", TERMS)
    def test_a_term_is_the_mean_over_frames(self, chosen):
        adaptation = adapted(chosen)
        whole = term(adaptation, X)
        alone = [term(adaptation, X[n : n + 1, :length], LENGTHS[n : n + 1]) for n, length in enumerate([3, 5])]
        torch.testing.assert_close(whole, (3 * alone[0] + 5 * alone[1]) / 8)

    @pytest.mark.parametrize("chosen", TERMS)
    def test_padding_may_be_counted(self, chosen):
        counting = adapted(chosen.model_copy(update={"padding": "count"}))
        torch.testing.assert_close(term(counting, X), term(adapted(chosen), X, torch.tensor([5, 5])))
        assert not torch.allclose(term(counting, X), term(adapted(chosen), X))

    @pytest.mark.parametrize("chosen", TERMS)
    def test_padding_that_is_no_number_changes_neither_value_nor_gradient(self, chosen):
        spoiled = X.clone()
        spoiled[0, 3:] = torch.nan
        values, gradients = [], []
        for x in (X, spoiled):
            adaptation = adapted(chosen)
            view = adaptation.source_view((x, LENGTHS))
            outputs = adaptation.model(x, LENGTHS)
            value = adaptation.loss(F.cross_entropy(outputs[1], torch.zeros(5).long()), outputs, source=view)
            values.append(value.detach())
            (gradient,) = torch.autograd.grad(value, adaptation.model.head.bias, allow_unused=True)
            gradients.append(gradient)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*gradients)

    def test_lengths_survive_the_sources_head(self):
        """With labels of its own the outputs compared are the head's, which returns no lengths."""
        chosen = TERMS[0]
        model, source = frames(1, lengths=True, classes=2), frames(0, lengths=True)
        adaptation = adapted(chosen, model=model, source=source)
        short, long = (term(adaptation, x) for x in (X, padded(X)))
        torch.testing.assert_close(short, long)
        rows = torch.cat([X[0, :3], X[1]])
        body = lambda one: torch.tanh(one.body(rows))  # noqa: E731
        ours, theirs = source.head(body(adaptation.model)), source.head(body(source))
        expected = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1).mean()
        torch.testing.assert_close(short, expected)

    @pytest.mark.parametrize("keep", [True, False])
    @pytest.mark.parametrize("chosen", TERMS)
    def test_fit_leaves_padding_out(self, chosen, keep):
        """Batches are dictionaries; kept outputs of the source know the padding too."""
        labels = torch.zeros(2, 5).long().masked_fill(~VALID, -100)
        states = []
        for x, y in ((X, labels), (padded(X), padded(labels.float() + 100).long() - 100)):
            y = torch.where(torch.arange(y.shape[1]) < LENGTHS[:, None], y, -100)  # noqa: PLW2901
            adaptation = adapted(chosen)
            data = {"inputs": x, "lengths": LENGTHS, "labels": y}
            training = ctl.Training(epochs=3, batch_size=2, optimizer="sgd", lr=0.5, device="cpu")
            ctl.fit(adaptation, data, training=training, keep_frozen_outputs=keep, seed=0)
            states.append(adaptation.model.state_dict())
        for name, tensor in states[0].items():
            torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)

    def test_a_mask_in_the_batch_serves_a_forward_that_names_none(self):
        adaptation = adapted(TERMS[1])
        batch = {"inputs": X, "attention_mask": VALID, "labels": torch.zeros(2, 5).long()}
        view = adaptation.source_view(batch, lambda model, batch: model(batch["inputs"]))
        outputs = adaptation.model(X)
        task = outputs.square().mean()
        torch.testing.assert_close(adaptation.loss(task, outputs, source=view) - task, term(adapted(TERMS[1]), X))


class TestLabels:
    """Positions whose label is -100 do not count for outputs."""

    def term(self, loss, logits, **more):
        class Plus(nn.Module):
            def __init__(self):
                super().__init__()
                self.bias = nn.Parameter(torch.zeros(3))

            def forward(self, x):
                return x + self.bias

        adaptation = ctl.adapt(Plus(), Plus(), [TERMS[0]])
        with torch.no_grad():
            adaptation.model.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
        outputs = adaptation.model(logits)
        task = loss(outputs)
        return (adaptation.loss(task, outputs, logits, **more) - task).item()

    def test_they_are_those_that_the_loss_ignores(self):
        logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3))
        labels = torch.zeros(2, 5).long().masked_fill(~VALID, -100)
        expected = self.term(lambda o: F.cross_entropy(o, torch.zeros(8).long()), logits[VALID])
        flat = self.term(lambda o: F.cross_entropy(o.view(-1, 3), labels.view(-1)), logits)
        swapped = self.term(lambda o: F.cross_entropy(o.transpose(1, 2), labels), logits)
        other = self.term(
            lambda o: F.cross_entropy(o.transpose(1, 2), labels.clamp(0).masked_fill(~VALID, 7), ignore_index=7), logits
        )
        assert [flat, swapped, other] == pytest.approx([expected] * 3, rel=1e-4)
        assert self.term(lambda o: F.cross_entropy(o.transpose(1, 2), labels.clamp(0)), logits) != pytest.approx(
            expected, rel=1e-2
        )

    def test_they_are_those_of_the_batch_if_the_loss_hides_them(self):
        logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3))
        labels = torch.zeros(2, 5).long().masked_fill(~VALID, -100)
        found = self.term(lambda o: -o.log_softmax(-1)[VALID].mean(), logits, batch=(logits, labels))
        expected = self.term(lambda o: F.cross_entropy(o, torch.zeros(8).long()), logits[VALID])
        assert found == pytest.approx(expected, rel=1e-4)

    def test_pixels(self):
        logits = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(3))
        labels = torch.zeros(2, 2, 4).long()
        labels[:, 1] = -100
        found = self.term(lambda o: F.cross_entropy(o.permute(0, 3, 1, 2), labels), logits)
        expected = self.term(lambda o: F.cross_entropy(o, torch.zeros(8).long()), logits[:, 0].reshape(8, 3))
        assert found == pytest.approx(expected, rel=1e-4)


class TestMeasurements:
    def measured(self, chosen, x, **options):
        adaptation = ctl.adapt(frames(1, **options), frames(0, **options), [chosen])
        labels = torch.tensor([0, 2]) if options.get("pooled") else torch.zeros(2, x.shape[1]).long()
        if not options.get("pooled"):
            labels[:, 1] = 1
        adaptation.measure([{"inputs": x, "lengths": LENGTHS, "labels": labels}])
        return adaptation

    def test_statistics_of_the_norms(self):
        """Mean and unbiased variance over the frames that are no padding."""
        chosen = ctl.NormAdaptation(statistics="target")
        source = frames(0, norm=True)
        rows = source.body(torch.cat([X[0, :3], X[1]]))
        for x in (X, padded(X)):
            model = self.measured(chosen, x, norm=True).model
            torch.testing.assert_close(model.norm.running_mean, rows.mean(0))
            torch.testing.assert_close(model.norm.running_var, rows.var(0))

    @pytest.mark.parametrize("pooled", [False, True])
    @pytest.mark.parametrize("chosen", [ctl.FisherSP(), ctl.FeatureConservation(attention=True, layers=1)])
    def test_fisher_and_attention(self, chosen, pooled):
        found = [self.measured(chosen, x, pooled=pooled).measured for x in (X, padded(X))]
        for name, tensors in found[0].items():
            for key, tensor in tensors.items():
                torch.testing.assert_close(tensor, found[1][name][key])

    def test_statistics_of_each_example(self):
        """By hand: mean and variance over its frames, mixed with the source's."""
        adaptation = ctl.adapt(
            frames(1, norm=True), frames(0, norm=True), [ctl.NormAdaptation(statistics="instance", prior=1)]
        )
        model = adaptation.model.eval()
        outputs = model(X, LENGTHS)
        torch.testing.assert_close(model(padded(X), LENGTHS)[:, :5][VALID], outputs[VALID])
        rows = model.body(X[0, :3])
        mean, variance = rows.mean(0) / 2, (1 + rows.var(0, correction=0)) / 2  # the source's are 0 and 1
        expected = model.head(torch.tanh((rows - mean) / (variance + 1e-5).sqrt()))
        torch.testing.assert_close(outputs[0, :3], expected)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(X, LENGTHS), outputs)
        assert torch.equal(adaptation.merged()(inputs=X, lengths=LENGTHS), outputs)
