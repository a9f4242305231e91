"""Taps record all that a forward pass computes, and nothing of another pass."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import conservtl as ctl
from conservtl.runtime.layer_features import all_tensors_of
from conservtl.runtime.taps import Taps

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.norm(self.linear(x)).tanh()


class Dropped(nn.Module):
    """Layers named in ``dropped`` do not run in train mode."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block(4) for _ in range(3))
        self.head = nn.Linear(4, 3)
        self.dropped = set()
        self.how = lambda block, x: block(x)

    def forward(self, x):
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if not (self.training and number in self.dropped):
                x = self.how(block, x)
        return self.head(x)

    def features(self, x):
        """Layer -> its output, for the layers that run."""
        x = self.stem(x)
        found = {"stem": x}
        for number, block in enumerate(self.blocks):
            if not (self.training and number in self.dropped):
                x = found[f"blocks.{number}"] = block(x)
        return found


def make(cls, seed):
    torch.manual_seed(seed)
    return cls()


def loss_of(adaptation, x=X):
    outputs = adaptation.model(x)
    return adaptation.loss(0 * outputs.sum(), outputs, x)


def delta(features, source):
    return (features - source).square().sum(-1).mean() / 2


class TestLayersThatDoNotRun:
    @pytest.mark.parametrize("dropped", [[1], [0, 2], [0, 1, 2], []])
    def test_are_left_out_of_the_step(self, dropped):
        """Of value and gradient: the sum over those that ran."""
        source = make(Dropped, 2)
        adaptation = ctl.adapt(make(Dropped, 1), source, [ctl.FeatureConservation(alpha=0.5)], example=X)
        model = adaptation.model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        reference = copy.deepcopy(model)
        model.dropped = reference.dropped = set(dropped)
        value = loss_of(adaptation)
        target = source.eval().features(X)
        expected = 0.5 * sum(delta(ran, target[layer].detach()) for layer, ran in reference.features(X).items())
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert (ours.grad is None or not ours.grad.any()) if theirs.grad is None else True
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)

    @pytest.mark.parametrize(
        "strategy", [ctl.FeatureConservation(layers=("blocks.*",)), ctl.SpectralShrinkage(layer="blocks.1")]
    )
    def test_none_of_those_tapped_adds_zero(self, strategy):
        adaptation = ctl.adapt(make(Dropped, 1), make(Dropped, 2), [strategy], example=X)
        adaptation.model.dropped = {0, 1, 2}
        outputs = adaptation.model(X)
        task = F.cross_entropy(outputs, Y)
        found = adaptation.loss(task, outputs, X)
        assert found == task
        found.backward()

    def test_features_of_an_earlier_step_are_not_taken_for_this_one(self):
        """A pass that no loss followed left records of all layers."""
        adaptation = ctl.adapt(make(Dropped, 1), make(Dropped, 2), [ctl.FeatureConservation(alpha=1.0)], example=X)
        with torch.no_grad():
            adaptation.model.stem.weight.add_(0.3)
        adaptation.model(X)
        adaptation.model.dropped = {0, 1, 2}
        target = make(Dropped, 2).eval().features(X)["stem"]
        torch.testing.assert_close(loss_of(adaptation), delta(adaptation.model.stem(X), target))

    def test_fit_trains_with_random_layerdrop(self):
        class Random(Dropped):
            def forward(self, x):
                self.dropped = {number for number in range(3) if torch.rand(()) < 0.5}
                return super().forward(x)

        adaptation = ctl.adapt(make(Random, 1), make(Random, 2), [ctl.FeatureConservation()], example=X)
        ctl.fit(adaptation, (X, Y), training=ctl.Training(epochs=3, lr=0.1, batch_size=2))

    def test_hugging_face_layerdrop(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.Wav2Vec2Config(
            hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, conv_dim=(4,),
            conv_stride=(4,), conv_kernel=(4,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, classifier_proj_size=4, num_labels=3, layerdrop=0.9, mask_time_prob=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        model, source = (transformers.Wav2Vec2ForSequenceClassification(config) for _ in range(2))
        waves = torch.randn(2, 64)
        adaptation = ctl.adapt(model, source, [ctl.FeatureConservation(layers=6)], example=waves)
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.01)
        model.train()
        for _ in range(6):
            outputs = model(waves)
            loss = adaptation.loss(outputs.logits.square().mean(), outputs, waves)
            assert loss.isfinite()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


class TestCheckpoints:
    def adapted(self, how):
        adaptation = ctl.adapt(make(Dropped, 1), make(Dropped, 2), [ctl.FeatureConservation(alpha=1.0)], example=X)
        adaptation.model.how = how
        return adaptation

    def test_a_reentrant_one_is_named(self):
        adaptation = self.adapted(lambda block, x: checkpoint(block, x, use_reentrant=True))
        with pytest.raises(ctl.SpecError, match=r"'blocks\.0' has no gradient: .*reentrant.*use_reentrant=False"):
            loss_of(adaptation)

    def test_others_change_nothing(self):
        values = []
        for how in (lambda block, x: block(x), lambda block, x: checkpoint(block, x, use_reentrant=False)):
            adaptation = self.adapted(how)
            for _ in range(2):
                loss_of(adaptation).backward()  # computes the blocks again
            values.append([parameter.grad for parameter in adaptation.model.parameters()])
        for plain, again in zip(*values, strict=True):
            torch.testing.assert_close(plain, again)

    def test_a_part_that_the_model_runs_without_gradients_is_compared(self):
        class Partly(Dropped):
            def forward(self, x):
                with torch.no_grad():
                    x = self.blocks[0](self.stem(x))
                return self.head(self.blocks[2](self.blocks[1](x)))

        adaptation = ctl.adapt(make(Partly, 1), make(Partly, 2), [ctl.FeatureConservation(alpha=1.0)], example=X)
        with torch.no_grad():
            adaptation.model.stem.bias.add_(0.3)
        target, ours = make(Partly, 2).eval().features(X), adaptation.model.eval().features(X)
        expected = sum(delta(ours[layer], target[layer]) for layer in ("stem", "blocks.0", "blocks.1", "blocks.2"))
        torch.testing.assert_close(loss_of(adaptation), expected)


class Siamese(nn.Module):
    """One encoder for both inputs."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, a, b):
        return self.head((self.encoder(a) - self.encoder(b)).abs())


class TestSeveralPasses:
    """Features are those of the last pass, so a loss of an earlier one, too, is refused; values are 0 at the source."""

    @pytest.fixture
    def adaptation(self):
        source = make(Dropped, 2)
        return ctl.adapt(make(Dropped, 1), source, [ctl.FeatureConservation(alpha=1.0, layers=("stem",))])

    def refused(self):
        return pytest.raises(ctl.SpecError, match=r"come from 2 forward passes .* of the last alone .* after each pass")

    @pytest.mark.parametrize("given", [0, 1])
    def test_a_loss_of_two_is_refused(self, adaptation, given):
        inputs = X, X.flip(0) * 2
        outputs = [adaptation.model(one) for one in inputs]
        with self.refused():
            adaptation.loss((outputs[0] - outputs[1]).square().mean(), outputs[given], inputs[given])
        torch.testing.assert_close(loss_of(adaptation), torch.zeros(()))

    @pytest.mark.parametrize("taken", [0, 1])
    def test_they_are_told_apart_where_the_model_is_compiled(self, adaptation, taken):
        """Also after a first loss, from which on a single pass is kept for each."""
        torch.compiler.reset()
        model = torch.compile(adaptation.model, backend="aot_eager")
        for _ in range(taken):
            outputs = model(X)
            adaptation.loss(0 * outputs.sum(), outputs, X)
        outputs = [model(one) for one in (X, 2 * X)]
        with self.refused():
            adaptation.loss((outputs[0] - outputs[1]).square().mean(), outputs[1], 2 * X)
        model(2 * X)
        outputs = model(X)
        torch.testing.assert_close(adaptation.loss(0 * outputs.sum(), outputs, X), torch.zeros(()))
        torch.compiler.reset()

    def test_outputs_of_the_first_are_refused(self, adaptation):
        outputs = adaptation.model(X)
        adaptation.model(2 * X)
        with self.refused():
            adaptation.loss(outputs.sum(), outputs, X)

    def test_one_that_the_loss_does_not_come_from_counts_for_nothing(self, adaptation):
        adaptation.model(2 * X).sum().backward()
        torch.testing.assert_close(loss_of(adaptation), torch.zeros(()))

    def test_a_loss_after_each(self, adaptation):
        with torch.no_grad():
            adaptation.model.stem.bias.add_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
        first = adaptation.model(X)
        term = adaptation.loss(0 * first.sum(), first, X)
        second = adaptation.model(2 * X)
        both = adaptation.loss((first - second).square().mean(), second, 2 * X) + term
        torch.testing.assert_close(both - (first - second).square().mean(), torch.tensor(2.0 + 2.0))  # 2² / 2 for each

    def test_a_checkpoint_around_the_model(self, adaptation):
        for _ in range(2):
            outputs = checkpoint(adaptation.model, X, use_reentrant=False)
            loss = adaptation.loss(0 * outputs.sum(), outputs, X)
            loss.backward()  # computes the model again
            torch.testing.assert_close(loss, torch.zeros(()))


def test_inputs_that_the_source_model_cannot_be_called_with():
    adaptation = ctl.adapt(make(Siamese, 1), make(Siamese, 2), [ctl.OutputConservation()], head=["head"])
    outputs = adaptation.model(X, X)
    with pytest.raises(ctl.SpecError, match=r"with a Tensor the source model raises .* 'b'\. Write .* inputs=\(a, b\)"):
        adaptation.loss(nn.functional.cross_entropy(outputs, torch.arange(len(X)) % 3), outputs, X)


class TestSeveralOutputs:
    def test_all_calls_of_a_module_count(self):
        a, b = X, X.flip(0) * 2
        source = make(Siamese, 2)
        adaptation = ctl.adapt(
            make(Siamese, 1), source, [ctl.FeatureConservation(alpha=1.0, layers=("encoder*",))], example=(a, b)
        )
        with torch.no_grad():
            adaptation.model.encoder[0].weight.add_(0.2)
        outputs = adaptation.model(a, b)
        found = adaptation.loss(0 * outputs.sum(), outputs, (a, b))
        ours, theirs = adaptation.model.encoder, source.encoder
        expected = (delta(ours(a), theirs(a)) + delta(ours(b), theirs(b))) / 2
        assert not torch.isclose(expected, delta(ours(b), theirs(b)))
        torch.testing.assert_close(found, expected)

    def test_fit_with_two_passes_for_a_batch(self):
        """The source makes as many: each is compared with its own."""
        x, z = X, X.flip(0) * 2
        source = make(Dropped, 2)
        adaptation = ctl.adapt(make(Dropped, 1), source, [ctl.FeatureConservation(alpha=1.0, layers=("stem",))])
        with torch.no_grad():
            adaptation.model.stem.weight.add_(0.2)
        adaptation.model(X)  # another, which is not of the batch
        both = adaptation.model(x), adaptation.model(z)
        view = adaptation.source_view((x, z), forward=lambda model, batch: (model(batch[0]), model(batch[1])))
        found = adaptation.loss(0 * both[0].sum(), both, source=view)
        ours, theirs = adaptation.model.stem, source.stem
        torch.testing.assert_close(found, (delta(ours(x), theirs(x)) + delta(ours(z), theirs(z))) / 2)

    def test_a_list_of_maps(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 2)

            def forward(self, x):
                return [self.a(x), self.b(x)]

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.branches, self.head = Branches(), nn.Linear(7, 3)

            def forward(self, x):
                return self.head(torch.cat(self.branches(x), 1))

        source = make(Model, 2)
        strategy = ctl.FeatureConservation(alpha=1.0, layers=("branches*",))
        adaptation = ctl.adapt(make(Model, 1), source, [strategy], layers=["branches", "head"])
        with torch.no_grad():
            for parameter in adaptation.model.parameters():
                parameter.add_(0.1)
        ours, theirs = adaptation.model.branches(X), source.branches(X)
        torch.testing.assert_close(loss_of(adaptation), sum(map(delta, ours, theirs)) / 2)

    def test_numbers_of_calls_that_differ_are_refused(self):
        class Repeats(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x):
                for _ in range(3 if self.training else 2):
                    x = self.layer(x)
                return self.head(x)

        adaptation = ctl.adapt(make(Repeats, 1), make(Repeats, 2), [ctl.FeatureConservation()])
        with pytest.raises(ctl.SpecError, match=r"'layer' gives 3 outputs.*2 in one of the source"):
            loss_of(adaptation)

    @pytest.mark.parametrize(
        ("output", "count"),
        [
            (torch.zeros(2, 5, 4), 1),
            ((torch.zeros(2, 5, 4), torch.zeros(2, 2, 5, 5)), 1),  # an attention map
            ((torch.zeros(2, 5, 4), torch.zeros(2, 5, 5)), 1),
            ((torch.zeros(2, 5, 4), None), 1),
            ((torch.zeros(2, 5, 4), torch.tensor([3, 5])), 1),  # lengths
            ((torch.zeros(2, 5, 4), torch.zeros(2, 7, 4)), 2),  # two streams
            ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 6, 4, 4)], 2),  # two resolutions
        ],
    )
    def test_parts_of_an_output(self, output, count):
        assert len(all_tensors_of(output, "layer")) == count

    def test_a_recurrent_layer_returns_its_state_too(self):
        module = nn.GRU(4, 4, 2, batch_first=True)
        assert len(all_tensors_of(module(torch.zeros(2, 2, 4)), "gru", module)) == 1


def test_a_copied_model_records_nothing():
    model = make(Dropped, 1)
    taps = Taps(model, {"stem": "stem"}, ["head"])
    copy.deepcopy(model)(X)
    with pytest.raises(ctl.SpecError, match="made no forward pass"):
        taps.take()
    model(X)
    assert set(taps.take().entering) == {"head"}
    taps.remove()
    model(X)
    with pytest.raises(ctl.SpecError, match="made no forward pass"):
        taps.take()


def test_an_input_given_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(input=x)

    model = Named()
    taps = Taps(model, {}, ["head"])
    model(X)
    assert torch.equal(taps.take().entering["head"], X)


class Writing(nn.Module):
    """A layer whose output is written into: always, by dropout in training mode, if told so, or never."""

    def __init__(self, how):
        super().__init__()
        self.stem, self.drop, self.head = nn.Linear(4, 4), nn.Dropout(0.5, inplace=True), nn.Linear(4, 3)
        self.drop.train(how == "in training mode")
        self.writes = how == "always"

    def forward(self, x):
        self.seen = self.stem(x)
        before, x = self.seen.detach().clone(), self.drop(self.seen)
        self.was = before
        return self.head(x.relu_() if self.writes else x.relu())


class TestCopies:
    @pytest.mark.parametrize(("how", "copied"), [("always", True), ("in training mode", True), ("never", False)])
    def test_are_made_of_what_is_written_into_and_of_nothing_else(self, how, copied):
        model = make(lambda: Writing(how), 0)
        taps = Taps(model, {"stem": "stem"}, ["head"])
        for number in range(4):
            model(X + number)
            taken = taps.take()
            assert torch.equal(taken.features["stem"], model.was)
            assert (taken.features["stem"].data_ptr() != model.seen.data_ptr()) == (copied or number == 0)

    def test_a_change_of_modes_between_steps(self):
        """Dropout in place acts in training mode: each mode is learned by itself, and none is forgotten."""
        model = make(lambda: Writing("never"), 0)
        taps = Taps(model, {"stem": "stem"})
        copies = []
        for training in (False, False, True, True, False, True):
            model.train(training)
            model(X)
            found = taps.take().features["stem"]
            assert torch.equal(found, model.was)
            copies.append(found.data_ptr() != model.seen.data_ptr())
        assert copies == [True, False, True, True, False, True]

    def test_gradients_are_the_same_bits_with_and_without(self):
        """A resumed run copies once more: its gradients must be summed in the same order."""

        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x):
                x = self.stem(x)
                return self.head(x.sin() + x)

        model = make(Residual, 0)
        taps, found = Taps(model, {"stem": "stem"}), []
        for _ in range(2):
            model.zero_grad()
            output = model(X)
            feature = taps.take().features["stem"]
            (output.exp().sum() / 7 + feature.exp().sum() / 3).backward()
            found.append([parameter.grad.clone() for parameter in model.parameters()])
        assert all(map(torch.equal, *found))

    def test_what_is_written_into_for_the_first_time_is_not_used(self):
        model = make(lambda: Writing("never"), 0)
        taps = Taps(model, {"stem": "stem"})
        for _ in range(2):
            model(X)
            taps.take()
        model.writes = True
        model(X)
        with pytest.raises(ctl.SpecError, match=r"'stem' was written into after .* call the model again"):
            taps.take()
        model(X)
        assert torch.equal(taps.take().features["stem"], model.was)

    def test_fit_makes_that_pass_again(self):
        source = make(lambda: Writing("never"), 2)
        adaptation = ctl.adapt(make(lambda: Writing("never"), 1), source, [ctl.FeatureConservation()], example=X)
        passes = []

        def forward(model, batch):
            passes.append(model.training and torch.is_grad_enabled())
            model.writes = sum(passes) > 3
            return model(batch[0])

        training = ctl.Training(epochs=4, batch_size=6, batch_norm="eval", device="cpu")
        result = ctl.fit(adaptation, (X, Y), training=training, forward=forward)
        assert result.steps == 4

    def test_the_source_model_is_run_again_where_it_writes(self):
        """By hand: the features of a source with a ReLU in place are those before it."""
        source = make(lambda: Writing("always"), 2)
        adaptation = ctl.adapt(make(lambda: Writing("always"), 1), source, [ctl.FeatureConservation()], example=X)
        runs = []
        for _ in range(2):
            view = adaptation.source_view(X, lambda model, batch: runs.append(0) or model(batch))
            torch.testing.assert_close(view.features["stem"], source.stem(X))
        assert len(runs) == 3

    def test_a_model_with_taps_is_freed_when_it_is_dropped(self):
        model = make(lambda: Writing("never"), 0)
        taps, seen = Taps(model, {"stem": "stem"}), weakref.ref(model)
        model(X)
        taps.take()
        taps.remove()
        del model, taps
        assert seen() is None
