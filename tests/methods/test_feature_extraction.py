"""Feature extraction: everything held, a new head on top."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.experiments.run.runner import run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.spec.spec import parse_spec


def network(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, classes))


def by_layer(plan):
    return {layer: (rows[0].origin, rows[0].frozen) for layer, rows in plan.by_layer()}


def test_a_head_of_the_same_shape_is_made_fresh():
    model, source = network(), {k: torch.zeros(v.shape) for k, v in network().state_dict().items()}
    held = model[2].weight.detach().clone()
    adaptation = ctl.adapt(model, source, [ctl.FeatureExtraction()])
    assert by_layer(adaptation.plan) == {"0": ("source", True), "1": ("source", True), "2": ("fresh", False)}
    assert adaptation.plan["2.weight"].reason == "declared fresh by FeatureExtraction"
    assert torch.equal(model[2].weight, held)
    assert not model[0].weight.any()


def test_whatever_does_not_fit_is_the_head():
    plan = ctl.adapt(network(3), network(2).state_dict(), [ctl.FeatureExtraction()]).plan
    assert by_layer(plan) == {"0": ("source", True), "1": ("source", True), "2": ("fresh", False)}
    assert plan["2.weight"].reason.startswith("shape differs")


def test_layers_left_fresh_by_layer_transfer_are_trained_too():
    """Frozen random layers under the head would be of no use; the order of the list does not matter."""
    pair = [ctl.FeatureExtraction(), ctl.LayerTransfer(layers=1, rest="fresh")]
    for strategies in (pair, pair[::-1]):
        plan = ctl.adapt(network(), network().state_dict(), strategies).plan
        assert by_layer(plan) == {"0": ("source", True), "1": ("fresh", False), "2": ("fresh", False)}


def test_layers_that_another_names_stay_as_it_says():
    plan = ctl.adapt(
        network(), network().state_dict(), [ctl.FeatureExtraction(), ctl.LayerTransfer(layers=1, freeze=False)]
    )
    assert by_layer(plan.plan) == {"0": ("source", False), "1": ("source", True), "2": ("fresh", False)}


def test_a_head_that_another_holds_is_refused():
    with pytest.raises(ctl.PlanError, match="FeatureExtraction and LayerTransfer both choose"):
        ctl.adapt(
            network(), network().state_dict(), [ctl.LayerTransfer(side="output", layers=1), ctl.FeatureExtraction()]
        )


class Net(nn.Module):
    """Two convolutions with norms, dropout and a head, on (N, 3, 12)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, inputs):
        return self.head(self.dropout(self.body(self.stem(inputs)).mean(-1)))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def adapted(*strategies):
    return ctl.adapt(net(), net(100), strategies, example=DATA[0][:2])


DATA = torch.randn(50, 3, 12, generator=torch.Generator().manual_seed(7)), torch.arange(50) % 4


class TestFitted:
    """svm, logistic, ncm: nothing is trained, and a classifier is written into the head at the end."""

    def test_nothing_is_trained(self):
        plan = ctl.adapt(network(), network().state_dict(), [ctl.FeatureExtraction(classifier="svm")]).plan
        assert by_layer(plan) == {"0": ("source", True), "1": ("source", True), "2": ("fresh", True)}
        assert plan.trained == ()
        (after,) = plan.after
        assert (after.head, after.classifier, after.C) == ("2", "svm", 0.03)
        assert "after  FeatureExtraction: 2 becomes a linear SVM (C = 0.03)" in str(plan)

    def test_fresh_layers_below_need_a_head_to_learn_under(self):
        """It is trained with them, and fitted when they have learned."""
        pair = [ctl.FeatureExtraction(classifier="ncm"), ctl.LayerTransfer(layers=1, rest="fresh")]
        for strategies in (pair, pair[::-1]):
            plan = ctl.adapt(network(), network().state_dict(), strategies).plan
            assert by_layer(plan) == {"0": ("source", True), "1": ("fresh", False), "2": ("fresh", False)}
            assert len(plan.after) == 1

    def test_so_do_layers_that_another_leaves_free(self):
        pair = [ctl.FeatureExtraction(classifier="ncm"), ctl.LayerTransfer(layers=1, freeze=False)]
        plan = ctl.adapt(network(), network().state_dict(), pair).plan
        assert by_layer(plan) == {"0": ("source", False), "1": ("source", True), "2": ("fresh", False)}

    @pytest.mark.parametrize("classifier", ["linear", "ncm"])
    def test_a_strength_without_a_regularisation(self, classifier):
        with pytest.raises(ValueError, match="C belongs to svm and logistic"):
            ctl.FeatureExtraction(classifier=classifier, C=1.0)

    def test_fit_makes_no_step_and_shows_what_was_fitted(self):
        """The line of the history is of the fitted head, not of the random one before it."""
        adaptation = adapted(ctl.FeatureExtraction(classifier="ncm"))
        result = ctl.fit(adaptation, DATA, {"target": DATA}, ctl.Training(device="cpu"), path={"target": DATA})
        logits = adaptation.model.eval()(DATA[0])
        right = (logits.argmax(1) == DATA[1]).float().mean().item()
        assert (result.steps, result.path, len(result.history)) == (0, (), 1)
        assert result.history[0]["target"]["accuracy"] == pytest.approx(right)
        assert result.best == pytest.approx(right)
        assert result.after["fitted_head"]["examples"] == 50

    def test_shuffled_and_streamed_data_give_the_same(self):
        held, streamed = (adapted(ctl.FeatureExtraction(classifier="logistic")) for _ in range(2))
        ctl.fit(held, DATA, training=ctl.Training(device="cpu", batch_size=16))
        ctl.fit(
            streamed,
            [(DATA[0][i : i + 7], DATA[1][i : i + 7]) for i in range(0, 50, 7)],
            training=ctl.Training(device="cpu"),
        )
        torch.testing.assert_close(held.model.head.weight, streamed.model.head.weight, rtol=1e-2, atol=1e-3)

    def test_augmentation_does_not_reach_it(self):
        one, other = (adapted(ctl.FeatureExtraction(classifier="ncm")) for _ in range(2))
        ctl.fit(one, DATA, training=ctl.Training(device="cpu"), seed=0)
        ctl.fit(
            other, DATA, training=ctl.Training(device="cpu"), seed=0, augment=lambda batch, _: (batch[0] * 0, batch[1])
        )
        assert torch.equal(one.model.head.weight, other.model.head.weight)

    def test_it_follows_what_was_trained(self):
        """With a norm left free the features move first, and the classifier is of the moved ones."""
        free = ctl.LayerTransfer(layers=1, side="input", freeze=False)
        adaptation = adapted(ctl.FeatureExtraction(classifier="ncm"), free)
        result = ctl.fit(adaptation, DATA, training=ctl.Training(device="cpu", epochs=2, lr=1e-2), seed=0)
        assert result.steps > 0
        model = adaptation.model.eval()
        features = model.body(model.stem(DATA[0])).mean(-1)
        means = torch.stack([features[DATA[1] == label].mean(0) for label in range(4)])
        torch.testing.assert_close(model.head.weight, 2 * means, rtol=1e-4, atol=1e-5)


class TestLayers:
    """Features from the middle of the model."""

    def test_a_head_of_its_own_width_takes_the_place(self):
        model = net()
        strategy = ctl.FeatureExtraction(classifier="ncm", layers=("stem*", "head"))
        adaptation = ctl.adapt(model, net(100), [strategy], example=DATA[0][:2])
        assert adaptation.plan["head.weight"].shape == (4, 16)
        assert adaptation.plan["head.weight"].reason == "shape differs: (4, 16) here, (4, 8) in the source"
        adaptation.finish([DATA])
        model.eval()
        stem = model.stem(DATA[0])
        features = torch.cat([stem.mean(-1), model.body(stem).mean(-1)], 1)
        means = torch.stack([features[DATA[1] == label].mean(0) for label in range(4)])
        expected = 2 * features @ means.T - means.square().sum(1)
        torch.testing.assert_close(model(DATA[0]), expected, rtol=1e-4, atol=1e-4)

    def test_it_is_trained_by_gradient_too(self):
        model = net()
        adaptation = ctl.adapt(model, net(100), [ctl.FeatureExtraction(layers=("stem*",))], example=DATA[0][:2])
        assert adaptation.plan.trained == ("head.weight", "head.bias")
        before = model.head.weight.detach().clone()
        history = ctl.fit(adaptation, DATA, training=ctl.Training(device="cpu", epochs=5, lr=1e-2), seed=0).history
        assert not torch.equal(model.head.weight, before)
        assert history[-1]["loss"] < history[0]["loss"]
        assert all(torch.equal(p, net(100).state_dict()[n]) for n, p in model.named_parameters() if "head" not in n)

    def test_a_refused_plan_leaves_the_model_as_it_was(self):
        model = net()
        head = model.head
        pair = [ctl.FeatureExtraction(layers=("stem*",)), ctl.LayerTransfer(layers=99)]
        with pytest.raises(ctl.SpecError, match="layers=99"):
            ctl.adapt(model, net(100), pair, example=DATA[0][:2])
        assert model.head is head
        assert not any(module._forward_hooks for module in model.modules())

    def test_no_layers_are_no_features(self):
        with pytest.raises(ValueError, match="layers"):
            ctl.FeatureExtraction(layers=())

    def test_a_copy_of_the_adaptation_fits_the_same(self):
        strategy = ctl.FeatureExtraction(classifier="svm", layers=("stem*",))
        one = ctl.adapt(net(), net(100), [strategy], example=DATA[0][:2])
        other = copy.deepcopy(one)
        for adaptation in (one, other):
            adaptation.finish([DATA])
        assert torch.equal(one.model.eval()(DATA[0]), other.model.eval()(DATA[0]))


@pytest.mark.parametrize("layers", [None, ["blocks.1", "head"]])
@pytest.mark.parametrize("classifier", ["svm", "ncm"])
def test_a_speech_run_predicts_from_its_file(classifier, layers, speech_fields, tmp_path):
    strategy = {"kind": "feature_extraction", "classifier": classifier, "layers": layers}
    spec = parse_spec({**speech_fields, "strategies": [strategy]})
    report = run(spec, tmp_path / "out")
    adapted, test = ctl.load_adapted(tmp_path / "out"), prepare(spec).domains.target_test
    right = (adapted.probabilities(test.inputs).argmax(1) == test.labels).float().mean().item()
    assert report["after"]["target"]["accuracy"] == pytest.approx(right)
    assert report["before"]["source"] is not None
    assert report["after"]["target"]["accuracy"] > 0.5
    assert report["finished"]["fitted_head"]["features"] == (72 if layers is None else 120)
    assert set(report["drift"].values()) == {0.0}


def test_with_labels_of_its_own_the_source_keeps_its_head(tmp_path):
    """What is measured on the source is the body under the source's own head, whatever feeds the new one."""
    spec = parse_spec(
        {
            "task": "vision",
            "source": {
                "training": {"device": "cpu", "epochs": 1, "lr": 3e-3, "evaluate_every": 9},
                "cache": str(tmp_path),
            },
            "data": {"kind": "digits", "shots": 2},
            "strategies": [{"kind": "feature_extraction", "classifier": "ncm", "layers": ["layer2.*", "linear"]}],
        }
    )
    report = run(spec, tmp_path / "out")
    assert report["after"]["source"] == report["before"]["source"]
    assert report["after"]["target"]["accuracy"] > report["before"]["target"]["accuracy"]
    assert len(ctl.load_adapted(tmp_path / "out").labels) == 5


def test_a_vision_model():
    from conservtl.tasks.vision.cifar_resnet import CifarResNet

    torch.manual_seed(0)
    model, source, images = CifarResNet(20, 3), CifarResNet(20, 3), torch.randn(12, 3, 16, 16)
    strategy = ctl.FeatureExtraction(classifier="logistic", layers=("layer2.2", "linear"))
    adaptation = ctl.adapt(model, source, [strategy], example=images)
    adaptation.finish([(images, torch.arange(12) % 3)])
    assert adaptation.plan["linear.weight"].shape == (3, 32 + 64)
    assert (model.eval()(images).argmax(1) == torch.arange(12) % 3).all()
