"""A model as its own source: what its library did not fill is fresh, and keeps its values."""

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl

HEAD = ("classifier.weight", "classifier.bias")
X = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}


def network(classes=2):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, classes))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A body without a head, and a classifier of three classes."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(**sizes, vocab_size=40, num_labels=3)
    transformers.BertModel(config).save_pretrained(folder / "body")
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "classifier")
    return folder


class TestHuggingFace:
    @pytest.fixture
    def bert(self):
        return pytest.importorskip("transformers")

    def test_missing_keys(self, bert, saved):
        model, info = bert.BertForSequenceClassification.from_pretrained(saved / "body", output_loading_info=True)
        before = state_of(model)
        adaptation = ctl.adapt(model, ctl.itself(), [ctl.L2SP(alpha=0.1)])
        assert set(adaptation.plan.fresh) == set(HEAD) == info["missing_keys"]
        assert "not among the weights that from_pretrained loaded" in str(adaptation.plan)
        assert unchanged(model, before)

    def test_keys_of_another_shape(self, bert, saved):
        model = bert.BertForSequenceClassification.from_pretrained(
            saved / "classifier", num_labels=5, ignore_mismatched_sizes=True
        )
        assert ctl.adapt(model, ctl.itself()).plan.fresh == HEAD

    def test_nothing_is_missing(self, bert, saved):
        model = bert.BertForSequenceClassification.from_pretrained(saved / "classifier")
        adaptation = ctl.adapt(model, ctl.itself(), [ctl.OutputConservation()])
        assert adaptation.plan.fresh == ()

    def test_a_head_that_was_put_in_later(self, bert, saved):
        model = bert.BertForSequenceClassification.from_pretrained(saved / "classifier")
        model.classifier = nn.Linear(8, 4)
        assert ctl.adapt(model, ctl.itself()).plan.fresh == HEAD

    def test_inside_a_users_own(self, bert, saved):
        class Tagger(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = bert.BertModel.from_pretrained(saved / "body")
                self.tags = nn.Linear(8, 4)

        assert ctl.adapt(Tagger(), ctl.itself()).plan.fresh == ("tags.weight", "tags.bias")

    def test_moved_and_converted(self, bert, saved):
        model = bert.BertForSequenceClassification.from_pretrained(saved / "body").double()
        assert ctl.adapt(model, ctl.itself()).plan.fresh == HEAD

    @pytest.mark.parametrize("how", ["from its config", "a copy"])
    def test_a_model_that_tells_nothing_is_asked_about(self, bert, saved, how):
        model = bert.BertForSequenceClassification.from_pretrained(saved / "body")
        model = copy.deepcopy(model) if how == "a copy" else type(model)(model.config)
        with pytest.raises(ctl.SpecError, match=r"does not say which of its values are pretrained.*missing=\['head'\]"):
            ctl.adapt(model, ctl.itself())

    def test_a_random_head_is_never_called_source(self, bert, saved):
        model = bert.BertForSequenceClassification.from_pretrained(saved / "body")
        message = r"OutputConservation compares outputs.*no weights were loaded into the head: 'classifier\."
        with pytest.raises(ctl.SourceError, match=message):
            ctl.adapt(model, ctl.itself(), [ctl.OutputConservation()])
        assert ctl.adapt(model, ctl.itself(), [ctl.FeatureConservation()], example=X).plan.fresh == HEAD


class TestTimm:
    @pytest.fixture
    def timm(self):
        return pytest.importorskip("timm")

    @pytest.mark.parametrize(("classes", "fresh"), [(5, ("fc.weight", "fc.bias")), (1000, ()), (0, ())])
    def test_the_classifier(self, timm, classes, fresh):
        model = timm.create_model("test_resnet", num_classes=classes)
        before = state_of(model)
        assert ctl.adapt(model, ctl.itself()).plan.fresh == fresh
        assert unchanged(model, before)

    def test_a_classifier_that_was_reset(self, timm):
        model = timm.create_model("test_vit")
        model.reset_classifier(5)
        plan = ctl.adapt(model, ctl.itself()).plan
        assert plan.fresh == ("head.weight", "head.bias")
        assert "a classifier for 5 classes, and the published weights have 1000" in str(plan)

    def test_two_classifiers(self, timm):
        model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, depth=1, embed_dim=24)
        assert {name.partition(".")[0] for name in ctl.adapt(model, ctl.itself()).plan.fresh} == {"head", "head_dist"}


class TestNamed:
    @pytest.mark.parametrize("missing", [["2"], ["2.*"], {"2.weight", "2.bias"}])
    def test_missing_is_fresh_and_keeps_its_values(self, missing):
        model = network()
        before = state_of(model)
        adaptation = ctl.adapt(model, ctl.itself(missing=missing))
        assert adaptation.plan.fresh == ("2.weight", "2.bias")
        assert "given as missing (2" in str(adaptation.plan)
        assert unchanged(model, before)

    def test_nothing_is_missing(self):
        assert ctl.adapt(network(), ctl.itself(missing=[])).plan.fresh == ()

    def test_more_is_declared_fresh(self):
        model = network()
        before = state_of(model)
        plan = ctl.adapt(model, ctl.itself(missing=["2"]), fresh=["0.weight"]).plan
        assert plan.fresh == ("0.weight", "2.weight", "2.bias")
        assert not torch.equal(model[0].weight, before["0.weight"])

    def test_a_tied_parameter_is_missing_under_any_of_its_names(self):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
        model[2].weight = model[0].weight
        before = state_of(model)
        assert ctl.adapt(model, ctl.itself(missing=["2.weight"])).plan.fresh == ("0.weight",)
        assert unchanged(model, before)

    def test_a_buffer_may_be_missing(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        adaptation = ctl.adapt(model, ctl.itself(missing=["1.running_mean"]))
        assert adaptation.plan.fresh == ()
        assert "1 buffer keeps its own values" in str(adaptation.plan)

    def test_a_wrapped_model(self):
        assert ctl.adapt(nn.DataParallel(network()), ctl.itself(missing=["2"])).plan.fresh == ("2.weight", "2.bias")

    @pytest.mark.parametrize(
        ("missing", "options", "message"),
        [
            ("2", {}, r"must be a list of globs; received the text '2'\. Write missing=\['2'\]"),
            (["head"], {}, "'head': must match at least one"),
            (None, {}, r"Sequential does not say which of its values are pretrained"),
            ([], {"prefix": "model."}, "key, prefix and rename say how to read a source"),
        ],
    )
    def test_refused(self, missing, options, message):
        with pytest.raises(ctl.SpecError, match=message):
            ctl.adapt(network(), ctl.itself(missing=missing), **options)


class TestTheModelAsSource:
    """``adapt(m, m)`` says of everything that it is pretrained, or what is not."""

    @pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
    def test_with_nothing_fresh_it_asks(self, wrap):
        model = network()
        before = state_of(model)
        with pytest.raises(
            ctl.SourceError, match=r"the source is the model itself, and nothing in it is fresh.*itself"
        ):
            ctl.adapt(wrap(model), model, [ctl.L2SP(alpha=0.1)])
        assert unchanged(model, before)

    def test_with_something_fresh_it_goes_on(self):
        assert ctl.adapt(model := network(), model, fresh=["2"]).plan.fresh == ("2.weight", "2.bias")
        assert ctl.adapt(model := network(), model, [ctl.LayerTransfer(layers=1, rest="fresh")]).plan.fresh

    def test_a_copy_is_another_model(self):
        model = network()
        assert ctl.adapt(model, copy.deepcopy(model)).plan.fresh == ()
