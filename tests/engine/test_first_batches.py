"""Names, losses, labels and metrics are checked before the first step: each case comes out right, or is refused."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import conservtl as ctl
from conservtl.data import Examples
from conservtl.functions import accuracy, cross_entropy

G = torch.Generator().manual_seed(0)
X = torch.randn(12, 4, generator=G)
Y = torch.arange(12) % 3
Z = torch.randn(12, generator=G)


def linear(outputs=3, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(4, outputs)
    return ctl.adapt(model, copy.deepcopy(model), [ctl.L2SP(alpha=0.1)])


def settings(**more):
    return ctl.Training(epochs=2, batch_size=4, lr=0.1, optimizer="sgd", device="cpu", **more)


def fitted(data, outputs=3, valid=None, **more):
    """Return the trained weights."""
    adaptation = linear(outputs)
    ctl.fit(adaptation, data, valid, settings(), seed=1, **more)
    return adaptation.model.weight.detach()


def refused(message, data=(X, Y), outputs=3, valid=None, error=ctl.SpecError, training=None, **more):
    """Assert that the message comes before the first step."""
    adaptation = linear(outputs)
    before = adaptation.model.weight.clone()
    with pytest.raises(error, match=message):
        ctl.fit(adaptation, data, valid, training or settings(), **more)
    assert torch.equal(adaptation.model.weight, before)


class TestNames:
    @pytest.mark.parametrize("name", ["val", "Target", "", "a/b", "target ", "ziel\n", "数据"])
    def test_other_names_in_valid(self, name):
        refused(
            r"selected on the sets 'target' and 'source'; received .*Name it: valid=\{'target'", valid={name: (X, Y)}
        )
        refused(r"received .*Pass it as watch=", valid={"target": (X, Y), name: (X, Y)})

    def test_the_source_alone(self):
        refused("received 'source' alone. Add 'target'", valid={"source": (X, Y)})

    @pytest.mark.parametrize("name", ["val", "", "a/b", "target", "test set 1", "数据"])
    def test_watch_takes_any_name(self, name):
        result = ctl.fit(linear(), (X, Y), watch={name: (X, Y)}, training=settings())
        assert set(result.history[-1][name]) == {"loss", "accuracy"}

    @pytest.mark.parametrize("name", ["epoch", "step", "phase", "loss", "lr", "seconds", "valid"])
    def test_but_those_of_the_history(self, name):
        refused(rf"watch: '{name}' is a name of the results", watch={name: (X, Y)})

    def test_paths_and_other_types(self):
        refused("path: 't' is a name of the results", path={"t": (X, Y)})
        refused("watch: the names of sets must be text; received 1. Write '1'", watch={1: (X, Y)})

    def test_no_names(self):
        refused(r"valid must name its sets: valid=\{'target': data\}; received list", valid=[(X, Y)])
        assert ctl.fit(linear(), (X, Y), {}, settings()).best is None


class TestTorchLosses:
    """A loss of torch gets logits and labels; the reference is the same loss as a function of (outputs, batch)."""

    @pytest.mark.parametrize(
        "loss",
        [
            nn.CrossEntropyLoss(label_smoothing=0.1),
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
            F.cross_entropy,
            partial(F.cross_entropy, label_smoothing=0.1),
            nn.NLLLoss(),
            nn.MultiMarginLoss(),
        ],
    )
    def test_classes(self, loss):
        expected = fitted((X, Y), loss=lambda outputs, batch: loss(outputs, batch[1]))
        assert torch.equal(fitted((X, Y), loss=loss), expected)
        assert torch.equal(fitted({"input": X, "labels": Y}, loss=loss), expected)

    @pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), F.mse_loss, nn.BCEWithLogitsLoss()])
    @pytest.mark.parametrize(
        "labels", [Z.sigmoid(), Z.sigmoid()[:, None], Z.sigmoid().double(), (Z > 0), (Z > 0).int()]
    )
    def test_numbers_of_any_type_and_shape(self, loss, labels):
        expected = fitted((X, labels), 1, loss=lambda outputs, batch: loss(outputs, batch[1].reshape(-1, 1).float()))
        assert torch.equal(fitted((X, labels), 1, loss=loss), expected)

    def test_shapes_that_differ(self):
        refused(r"MSELoss compares .* outputs \(4, 3\) and labels \(4,\)", loss=nn.MSELoss(), data=(X, Z))

    def test_one_for_a_set(self):
        labels = Z[:, None]
        held_out = ctl.Holdout(
            (X, Z), forward=lambda model, batch: model(batch[0])[:, :1], loss=nn.MSELoss(), metrics=lambda *_: {}
        )
        result = ctl.fit(linear(), (X, Y), watch={"numbers": held_out}, training=settings())
        assert result.history[0]["numbers"].keys() == {"loss"}
        assert labels.shape == (12, 1)

    def test_measurements_and_sequences(self):
        """Logits (N, frames, classes) are brought into torch's layout; -100 does not count."""
        frames, labels = torch.randn(6, 5, 4), torch.randint(0, 3, (6, 5))
        labels[:, 3:] = -100
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.FisherSP(alpha=0.1)])
        ctl.fit(adaptation, (frames, labels), training=settings(), loss=nn.CrossEntropyLoss())
        expected = F.cross_entropy(model(frames).flatten(0, 1), labels.flatten(), ignore_index=-100)
        from conservtl.losses import as_loss

        torch.testing.assert_close(as_loss(nn.CrossEntropyLoss())(model(frames), (frames, labels)), expected)

    def test_classes_of_losses(self):
        refused(r"received the class MSELoss. Make one of it: add \(\)", loss=nn.MSELoss)
        refused("loss must be a function .* received None", loss=None)
        refused("loss must be a function .* received 'mse'", loss="mse")


class Weighted(nn.Module):
    """A user's loss with a number of its own."""

    def __init__(self, trained, device="cpu"):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, device=device), requires_grad=trained)
        self.register_buffer("shift", torch.tensor(0.5, device=device))

    def forward(self, outputs, batch):
        return self.scale * F.cross_entropy(outputs, batch[1]) + self.shift


class Targets(Weighted):
    def forward(self, outputs, targets):
        return self.scale * F.cross_entropy(outputs, targets) + self.shift


class TestModules:
    @pytest.mark.parametrize("cls", [Weighted, Targets])
    def test_constants(self, cls):
        expected = fitted((X, Y), loss=lambda outputs, batch: 2 * F.cross_entropy(outputs, batch[1]) + 0.5)
        assert torch.equal(fitted((X, Y), loss=cls(trained=False)), expected)

    def test_parameters_that_nothing_would_train(self):
        refused("nothing would train 'scale' of Weighted", loss=Weighted(trained=True))

    def test_parameters_of_the_model_are_trained(self):
        adaptation, loss = linear(), Weighted(trained=True)
        loss.scale = adaptation.model.bias
        ctl.fit(adaptation, (X, Y), training=settings(), loss=lambda outputs, batch: loss(outputs, batch).sum())

    def test_no_values(self):
        refused("Weighted has tensors on the meta device", loss=Weighted(trained=False, device="meta"))
        refused("meta device", loss=nn.CrossEntropyLoss(weight=torch.ones(3, device="meta")))


class TestLabelsOfTheDefaultLoss:
    @pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_whole_numbers_of_any_type(self, kind):
        expected = fitted((X, Y))
        assert torch.equal(fitted((X, Y.to(kind))), expected)
        assert torch.equal(fitted((X, Y.to(kind)[:, None])), expected)

    def test_their_accuracy(self):
        logits = torch.eye(3)
        assert accuracy(logits, (None, torch.tensor([[0], [1], [1]])))["accuracy"] == pytest.approx(2 / 3)

    @pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32, torch.float64])
    def test_one_hot_rows(self, kind):
        torch.testing.assert_close(fitted((X, F.one_hot(Y, 3).to(kind))), fitted((X, Y)))

    def test_by_hand(self):
        logits, expected = torch.tensor([[0.0, 1.0]]), torch.tensor(1.0).exp().add(1).log() - 1
        for labels in ([1], [[1]], [[0, 1]], [[0.0, 1.0]]):
            torch.testing.assert_close(cross_entropy(logits, (None, torch.tensor(labels))), expected)

    @pytest.mark.parametrize("labels", [Z, Z[:, None]])
    def test_regression(self, labels):
        refused(r"two classes or more .* 0 for one whatever the label.*nn\.MSELoss", (X, labels), 1)

    def test_regression_by_several_outputs(self):
        refused(r"probabilities that sum to 1 .*nn\.MSELoss", (X, torch.randn(12, 3)))
        refused(r"whole numbers, or probabilities .*float32 labels \(4,\)", (X, Z))

    def test_missing_labels(self):
        labels = torch.ones(12, 3)
        labels[0, :2] = torch.nan
        refused(r"2 values are NaN. If these are missing, pass a loss that leaves them out", (X, labels))

    def test_several_labels(self):
        refused(r"probabilities that sum to 1 .*BCEWithLogitsLoss", (X, torch.ones(12, 3)))
        refused(r"one class an example, \(N,\).*int64 labels \(4, 2\)", (X, torch.ones(12, 2).long()))

    @pytest.mark.parametrize("wrong", [3, 7, -1])
    def test_a_class_beyond_the_outputs_wherever_it_stands(self, wrong):
        labels = Y.clone()
        labels[11] = wrong
        refused(rf"the training data: labels must be positions of 3 outputs, 0 to 2, .*received {wrong}", (X, labels))
        refused(r"the set 'target' of valid: labels must be", valid={"target": (X, labels)})

    def test_ignored_positions(self):
        labels = Y.clone()
        labels[5] = -100
        assert fitted((X, labels)).isfinite().all()

    def test_an_example_without_a_batch(self):
        refused(r"outputs must be \(N, classes\)", [(X[0], Y[0]), (X[1], Y[1])])


class TestLosses:
    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda outputs, _: (outputs**2).mean(1), r"the loss must be a scalar.*shape \(4,\)"),
            (lambda *_: 1, "loss must return a tensor with a gradient; received int"),
            (lambda outputs, _: outputs.mean().item(), "received float"),
            (lambda *_: None, "received NoneType"),
            (lambda outputs, _: outputs.argmax(), "loss must return a real number; received int64"),
            (lambda outputs, _: outputs.detach().mean(), "loss must have a gradient"),
            (nn.CrossEntropyLoss(reduction="none"), r"the loss must be a scalar.*shape \(4,\).*reduction"),
        ],
    )
    @pytest.mark.parametrize("streamed", [False, True])
    def test_others_than_one_number(self, loss, message, streamed):
        data = DataLoader(TensorDataset(X, Y), 4) if streamed else (X, Y)
        refused(rf"the training data: .*{message}|{message}", data, loss=loss)

    @pytest.mark.parametrize("value", ["nan", "inf"])
    def test_no_number(self, value):
        refused(
            rf"the loss is {value} at batch 1 of epoch 1", error=ctl.TrainingDivergedError,
            loss=lambda outputs, _: outputs.abs().mean() * float(value),
        )  # fmt: skip

    @pytest.mark.parametrize(
        "loss",
        [
            lambda outputs, batch: ((outputs - batch[1]) ** 2).mean(),
            lambda outputs, batch: (batch[1] - outputs).abs().mean(),
            lambda outputs, batch: F.mse_loss(outputs, batch[1]),
            lambda outputs, batch: F.smooth_l1_loss(input=outputs, target=batch[1]),
        ],
    )
    def test_broadcasting(self, loss):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused(r"outputs \(4, 1\) and labels \(4,\) broadcast to 4 x 4 numbers", (X, Z), 1, loss=loss)
        assert fitted((X, Z), 1, loss=lambda outputs, batch: loss(outputs, (None, batch[1][:, None]))).isfinite().all()

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda outputs, labels: F.cross_entropy(outputs, labels), "with a tuple as the batch it raises TypeError"),
            (lambda outputs, labels: (outputs - labels.float()).mean(), "AttributeError: 'tuple'.*batch\\[1\\]"),
        ],
    )
    def test_functions_of_outputs_and_labels(self, loss, message):
        refused(rf"the training data: loss must be a function of \(outputs, batch\); .*{message}", loss=loss)

    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="sum"), partial(F.cross_entropy, reduction="sum")])
    def test_sums(self, loss):
        """A set's loss is the mean over its examples, and a batch's gradient must not grow with the batch."""
        refused(r"loss: \w+ must be the mean over a batch; received reduction='sum'", loss=loss)

    def test_inputs_of_a_set_that_the_model_cannot_take(self):
        message = (
            r"the set 'target' of valid: its inputs must be such as the model takes; for tensors of shape \(12, 3\)"
        )
        refused(message, valid={"target": (X[:, :3], Y)}, error=ctl.DataError)

    def test_pairs_that_are_meant(self):
        def pairs(outputs, batch):
            same = batch[1][:, None] == batch[1]
            return (torch.cdist(outputs, outputs) * same).mean() + (outputs[:, 0] - batch[1]).square().mean()

        assert fitted((X, Z), 1, loss=pairs).isfinite().all()

    def test_inputs_of_another_type(self):
        refused(
            r"inputs must be of the weights' type; received float64, and the weights are float32",
            (X.double(), Y), error=ctl.DataError,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("batch", "received"),
        [
            (1, "1"),
            ((1, 2), "a tuple of 2 parts"),
            ((X,), "a tuple of 1 part"),
            ([X], "a list of 1 part"),
        ],
    )
    def test_other_batches_than_inputs_and_labels(self, batch, received):
        refused(
            rf"the training data: a batch must be \(inputs, labels\), tensors, or .*; received {received}\. Give",
            [batch], error=ctl.DataError,
        )  # fmt: skip

    def test_a_loss_of_ones_own_needs_no_labels(self):
        assert fitted([(X,)], 1, loss=lambda outputs, _: outputs.square().mean()).isfinite().all()


class TestMetrics:
    @pytest.mark.parametrize(
        ("metrics", "message"),
        [
            (lambda *_: 0.5, r"metrics must return a dictionary.*received float"),
            (lambda outputs, _: {"norm": outputs}, r"'norm' is a tensor of shape \(12, 3\)"),
            (lambda *_: {"a": "good"}, "'a' is 'good'"),
            (lambda *_: {"a": (1, 2, 3)}, r"'a' is \(1, 2, 3\)"),
            (lambda *_: {"a": None}, "'a' is None"),
            (lambda *_: {"loss": 1.0}, "other than 'loss'.*received 'loss'"),
            (lambda *_: {3: 1.0}, "received 3"),
        ],
    )
    def test_others_than_numbers(self, metrics, message):
        """They are called at the first evaluation, and not before."""
        with pytest.raises(ctl.SpecError, match=message):
            ctl.fit(linear(), (X, Y), {"target": (X, Y)}, settings(), metrics=metrics)

    @pytest.mark.parametrize(("metrics", "received"), [(None, "None"), ("accuracy", "'accuracy'")])
    def test_others_than_functions(self, metrics, received):
        refused(f"metrics must be a function; received {received}", valid={"target": (X, Y)}, metrics=metrics)

    @pytest.mark.parametrize("metrics", [lambda outputs: {}, lambda a, b, c: {}])
    def test_others_than_functions_of_two_arguments(self, metrics):
        refused(
            r"the set 'target' of valid: metrics must be a function \(outputs, batch\)",
            valid={"target": (X, Y)},
            metrics=metrics,
        )

    def test_numbers(self):
        values = {
            "a": 1,
            "b": 0.5,
            "c": np.float32(2),
            "d": torch.tensor([3.0]),
            "e": (1, 4),
            "f": [torch.tensor(2), 4],
        }
        result = ctl.fit(linear(), (X, Y), {"target": (X, Y)}, settings(), metrics=lambda *_: values)
        found = result.history[0]["target"]
        assert [found[name] for name in values] == [1, 0.5, 2, 3, 0.25, 0.5]


class Rows(Dataset):
    """Examples as dictionaries."""

    def __len__(self):
        return 12

    def __getitem__(self, place):
        return {"input": X[place], "labels": Y[place]}


class TestData:
    EXPECTED = property(lambda _: fitted((X, Y)))

    @pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
    @pytest.mark.parametrize("labels", [np.int64, np.int32, np.uint8, np.uint16])
    def test_arrays(self, kind, labels):
        inputs, numbers = X.numpy().astype(kind), Y.numpy().astype(labels)
        if kind is np.float16:
            return refused(
                "inputs must be of the weights' type; received float16", (inputs, numbers), error=ctl.DataError
            )
        torch.testing.assert_close(fitted((inputs, numbers)), self.EXPECTED)
        torch.testing.assert_close(fitted({"input": inputs, "labels": numbers}), self.EXPECTED)
        return None

    def test_arrays_as_they_come(self):
        """Read-only, reversed, of another byte order."""
        inputs = np.ascontiguousarray(X.numpy()[::-1]).astype(">f8")[::-1]
        inputs.flags.writeable = False
        torch.testing.assert_close(fitted((inputs, Y.numpy().astype(">i4"))), self.EXPECTED)

    def test_lists(self):
        torch.testing.assert_close(fitted((X, Y.tolist())), self.EXPECTED)
        torch.testing.assert_close(fitted({"input": X.tolist(), "labels": Y.tolist()}), self.EXPECTED)

    def test_examples(self):
        names = tuple(map(str, range(12)))
        for inputs, labels in ((X.numpy(), Y.numpy()), (X.double().numpy(), Y.tolist()), (X.tolist(), Y)):
            data = Examples(inputs, labels, list(names))
            torch.testing.assert_close(fitted(data, valid={"target": data}), self.EXPECTED)
            assert data.take([1, 2]).names == ("1", "2")

    @pytest.mark.parametrize(("labels", "names"), [(Y[:3], 12), (Y, 3), ("abcdefghijkl", 12), (torch.tensor(3), 12)])
    def test_examples_of_other_lengths(self, labels, names):
        with pytest.raises(ctl.DataError, match=r"one row for each of \d+ names; received"):
            Examples(X, labels, tuple(map(str, range(names))))

    def test_loaders(self):
        arrays = [(X[i : i + 4].numpy(), Y[i : i + 4].numpy()) for i in (0, 4, 8)]
        tensors = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
        expected = fitted(tensors)
        torch.testing.assert_close(fitted(arrays), expected)
        torch.testing.assert_close(fitted(DataLoader(TensorDataset(X, Y), 4)), expected)
        torch.testing.assert_close(fitted(DataLoader(Rows(), 4)), expected)

    def test_text_among_them(self):
        data = {"input": X, "labels": Y, "names": ["a"] * 12}
        refused("a dictionary must hold tensors or arrays .*'names': 'list'", data, error=ctl.DataError)
        refused("a tuple must hold tensors or arrays .*ndarray", (X, np.array(["a"] * 12)), error=ctl.DataError)

    @pytest.mark.parametrize("kind", ["valid", "watch", "path"])
    def test_empty_loaders(self, kind):
        sets = {kind: {"target": DataLoader(TensorDataset(X[:0], Y[:0]), 4)}}
        refused(rf"the set 'target' of {kind}: a set to evaluate on has no examples", error=ctl.DataError, **sets)

    def test_an_empty_training_loader(self):
        refused("the data gave no batches", DataLoader(TensorDataset(X[:0], Y[:0]), 4), error=ctl.DataError)

    def test_random_generators_are_left_alone(self):
        """Checks draw nothing: a loader's order and dropout are those of a run without sets."""

        def trained(**sets):
            loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
            adaptation = ctl.adapt(model, copy.deepcopy(model))
            ctl.fit(adaptation, loader, training=settings(), seed=1, **sets)
            return model.state_dict()

        plain, checked = (
            trained(),
            trained(valid={"target": (X, Y)}, watch={"a": DataLoader(TensorDataset(X, Y), 4, shuffle=True)}),
        )
        for name, tensor in plain.items():
            assert torch.equal(tensor, checked[name])
