"""Which modules are the head: named, asked of the model, or found; tied, several, and refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.layers import find_layers
from conservtl.plan.plan import Plan

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[1, 2, 3], [4, 0, 2]])
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class TwoHeads(nn.Module):
    """Two outputs of one body."""

    def __init__(self, first=3, second=5):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 6), nn.Linear(6, first), nn.Linear(6, second)

    def forward(self, x):
        x = self.body(x).tanh()
        return self.first(x), self.second(x)


class Auxiliary(nn.Module):
    """An auxiliary head registered and used last, as in DeepLab."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier, self.aux = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = self.body(x)
        return {"out": self.classifier(x), "aux": self.aux(x)}


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(6, 3), nn.Linear(4, 6)

    def forward(self, x):
        return self.head(self.body(x))


class Features(nn.Module):
    """Returns the features beside the scores."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.body(x)
        return self.head(x), x


class Tied(nn.Module):
    def __init__(self, words=7):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(words, 4), nn.Linear(4, 4), nn.Linear(4, words, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.mix(self.embed(ids)).tanh())


class Asked(nn.Module):
    """As timm's models: says which its classifier is."""

    def __init__(self):
        super().__init__()
        self.body, self.scores, self.extra = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        x = self.body(x)
        return self.scores(x), self.extra(x)

    def get_classifier(self):
        return self.scores


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 8, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class SequenceToSequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.head = Tower(), Tower(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.decoder(self.encoder(x)))


def drawn(model, example=None, head=None):
    return Plan.draw(find_layers(model, example, head=head), {}, {})


def make(cls, seed, *options):
    torch.manual_seed(seed)
    return cls(*options)


class TestFound:
    @pytest.mark.parametrize(
        ("model", "example", "head"),
        [
            (HeadFirst, X, ("head.weight", "head.bias")),
            (Features, X, ("head.weight", "head.bias")),
            (Tied, IDS, ("embed.weight",)),
            (Tied, None, ("embed.weight",)),
            (Asked, X, ("scores.weight", "scores.bias")),
            (Asked, None, ("scores.weight", "scores.bias")),
        ],
    )
    def test_the_module_that_computes_the_scores(self, model, example, head):
        assert drawn(model(), example).head == head

    def test_a_tied_one_goes_by_the_name_of_the_output_layer(self):
        plan = drawn(Tied(), IDS)
        assert plan.head_module == "out"
        assert plan.tied_head == ("embed.weight",)

    @pytest.mark.parametrize("example", [X, None])
    @pytest.mark.parametrize(
        ("model", "listed"), [(TwoHeads, r"\['first', 'second'\]"), (Auxiliary, r"\['classifier', 'aux'\]")]
    )
    def test_several_that_remain_possible_are_listed(self, model, listed, example):
        with pytest.raises(ctl.SpecError, match=rf"{listed} may be.*adapt\(\.\.\., head="):
            _ = drawn(model(), example).head
        for strategy in (ctl.FeatureExtraction(), ctl.LPFT()):
            with pytest.raises(ctl.SpecError, match=listed):
                ctl.adapt(model(), model(), [strategy], example=example)

    def test_strategies_without_a_head_do_not_ask(self):
        strategies = [ctl.L2SP(alpha=0.1), ctl.LayerTransfer(layers=1)]
        assert ctl.adapt(TwoHeads(), TwoHeads(), strategies, example=X).plan.trained

    def test_norms_stay_in_their_tower(self):
        layers = {layer.name: layer.modules for layer in find_layers(SequenceToSequence(), torch.zeros(1, 2, 4))}
        assert layers == {
            "encoder.layers.0": ("encoder.layers.0",),
            "encoder.layers.1": ("encoder.layers.1", "encoder.norm"),
            "decoder.layers.0": ("decoder.layers.0",),
            "decoder.layers.1": ("decoder.layers.1",),
            "head": ("decoder.norm", "head"),
        }


class TestNamed:
    def test_one_of_two(self):
        adaptation = ctl.adapt(TwoHeads(), TwoHeads(), [ctl.FeatureExtraction()], example=X, head=["second"])
        assert adaptation.plan.fresh == adaptation.plan.trained == ("second.weight", "second.bias")

    def test_both(self):
        heads = ("first.weight", "first.bias", "second.weight", "second.bias")
        make_two = {"example": X, "head": ["first", "second"]}
        plan = ctl.adapt(TwoHeads(), TwoHeads(), [ctl.FeatureExtraction()], **make_two).plan
        assert plan.trained == plan.fresh == heads
        plan = ctl.adapt(TwoHeads(), TwoHeads(), [ctl.LPFT()], **make_two).plan
        assert plan.phases[0].frozen == ("body.weight", "body.bias")
        plan = ctl.adapt(TwoHeads(), TwoHeads(), [ctl.SurgicalFineTuning(block="last")], **make_two).plan
        assert plan.trained == ("body.weight", "body.bias")
        plan = ctl.adapt(TwoHeads(), TwoHeads(), [ctl.SurgicalFineTuning(head=True)], **make_two).plan
        assert set(plan.trained) == {"body.weight", "body.bias", *heads}

    def test_both_with_labels_of_their_own_are_compared_through_the_sources_heads(self):
        """The sum over the heads of the divergence of the source's head on the adapted body's features."""
        source = make(TwoHeads, 2)
        strategy = ctl.OutputConservation(weight=0.5, temperature=1.0, form="softmax")
        adaptation = ctl.adapt(make(TwoHeads, 1, 2, 4), source, [strategy], example=X, head=["first", "second"])
        with torch.no_grad():
            adaptation.model.body.weight.add_(0.3)
        outputs = adaptation.model(X)
        found = adaptation.loss(0 * outputs[0].sum(), outputs, X)
        expected = 0.0
        for head in (source.first, source.second):
            ours = head(adaptation.model.body(X).tanh()).log_softmax(1)
            theirs = head(source.body(X).tanh()).log_softmax(1)
            expected += 0.5 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        torch.testing.assert_close(found, expected)

    def test_globs(self):
        with pytest.raises(ctl.SelectorError, match=r"head: 'secnd'.*Did you mean 'second'"):
            ctl.adapt(TwoHeads(), TwoHeads(), head=["secnd"])
        with pytest.raises(ctl.SelectorError, match=r"^head must be a list of globs.* Write head=\['second'\]\.$"):
            ctl.adapt(TwoHeads(), TwoHeads(), head="second")

    def test_with_layers_of_ones_own(self):
        layers = ["body", "first", "second"]
        adaptation = ctl.adapt(TwoHeads(), TwoHeads(), [ctl.FeatureExtraction()], layers=layers, head=["first"])
        assert adaptation.plan.trained == ("first.weight", "first.bias")

    def test_a_fitted_classifier_needs_one(self):
        with pytest.raises(ctl.SpecError, match=r"one module is needed here; the head is \['first', 'second'\]"):
            ctl.adapt(TwoHeads(), TwoHeads(), [ctl.FeatureExtraction(classifier="ncm")], head=["first", "second"])


class TestSeveralOutputs:
    @pytest.mark.parametrize("head", [None, ["first"]])
    def test_are_refused_where_one_is_compared(self, head):
        with pytest.raises(ctl.SpecError, match=r"OutputConservation: .*one output.*\['first', 'second'\]"):
            ctl.adapt(TwoHeads(), TwoHeads(), [ctl.OutputConservation()], example=X, head=head)

    def test_scores_that_are_named_and_features_beside_them_are_no_others(self):
        for model in (Auxiliary, Features):
            assert ctl.adapt(model(), model(), [ctl.OutputConservation()], example=X).plan.terms


class TestTied:
    def adapted(self, *strategies, **options):
        return ctl.adapt(make(Tied, 1), make(Tied, 2), strategies, example=IDS, **options)

    @pytest.mark.parametrize("strategy", [ctl.FeatureExtraction(), ctl.FeatureExtraction(layers=("mix",))])
    def test_a_new_head_would_replace_the_embedding(self, strategy):
        model = make(Tied, 1)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ctl.SpecError, match=r"'embed.weight' and 'out.weight' are one tensor"):
            ctl.adapt(model, make(Tied, 2), [strategy], example=IDS)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_selectors_find_it_under_each_name(self):
        assert self.adapted(fresh=["out"]).plan.fresh == ("embed.weight",)
        assert self.adapted(fresh=["out.weight"]).plan.fresh == ("embed.weight",)
        plan = self.adapted(ctl.DiscriminativeLR(groups={"out": 0.1})).plan
        assert plan["embed.weight"].scale == 0.1
        assert plan["mix.weight"].scale == 1
        plan = self.adapted(ctl.SurgicalFineTuning(block="out")).plan
        assert plan.trained == ("embed.weight",)
        layers = ctl.adapt(Tied(), Tied(), layers=["mix", "out"]).plan.by_layer()
        assert {name: tuple(row.name for row in rows) for name, rows in layers} == {
            "mix": ("mix.weight", "mix.bias"),
            "out": ("embed.weight",),
        }

    def test_a_wider_glob_leaves_it_to_the_part_that_comes_first(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.shared = nn.Embedding(7, 4)
                self.decoder = Tied()
                self.decoder.embed = self.shared
                self.decoder.out.weight = self.shared.weight

            def forward(self, ids):
                return self.decoder(ids)

        plan = ctl.adapt(Both(), Both(), fresh=["decoder"]).plan
        assert plan.fresh == ("decoder.mix.weight", "decoder.mix.bias")

    def test_the_linear_probe_trains_the_tied_weight_and_it_starts_from_the_source(self):
        source = make(Tied, 2)
        adaptation = self.adapted(ctl.LPFT())
        assert adaptation.plan.phases[0].frozen == ("mix.weight", "mix.bias")
        assert torch.equal(adaptation.model.out.weight, source.embed.weight)

    def test_other_words_are_compared_through_the_sources_head(self):
        source = make(Tied, 2)
        adaptation = ctl.adapt(
            make(Tied, 1, 9), source, [ctl.OutputConservation(weight=1.0, temperature=1.0, form="softmax")], example=IDS
        )
        ids = IDS
        outputs = adaptation.model(ids)
        found = adaptation.loss(0 * outputs.sum(), outputs, ids)
        features = adaptation.model.mix(adaptation.model.embed(ids)).tanh()
        ours, theirs = source.out(features).log_softmax(-1), source(ids).log_softmax(-1)
        torch.testing.assert_close(found, (theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_hugging_face_and_timm_are_asked():
    transformers = pytest.importorskip("transformers")
    tiny = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    tiny |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        vocab_size=20, max_source_positions=10, max_target_positions=10, **tiny, **tokens
    )
    whisper = transformers.WhisperForConditionalGeneration(config)
    example = {"input_features": torch.zeros(1, 8, 20), "decoder_input_ids": torch.ones(1, 3, dtype=torch.long)}
    plan = drawn(whisper, example)
    assert (plan.head_module, plan.head) == ("proj_out", ("model.decoder.embed_tokens.weight",))
    layers = {layer.name: layer.modules for layer in find_layers(whisper, example)}
    assert layers["model.encoder.layers.0"] == ("model.encoder.layers.0", "model.encoder.layer_norm")
    with pytest.raises(ctl.SpecError, match="one tensor"):
        ctl.adapt(whisper, copy.deepcopy(whisper), [ctl.FeatureExtraction()], example=example)
    assert ctl.adapt(whisper, copy.deepcopy(whisper), fresh=["proj_out"]).plan.fresh == plan.head
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    assert drawn(bert).head_module == "classifier"
    timm = pytest.importorskip("timm")
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=12, num_heads=1)
    assert drawn(distilled).head_modules == ("head", "head_dist")


def test_a_model_that_says_it_has_no_head_is_asked_to_name_one():
    """As timm's with num_classes=0; its last weight is of the body, which a linear probe would begin anew."""

    class Body(nn.Sequential):
        def get_classifier(self):
            return nn.Identity()

    def body():
        return Body(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))

    with pytest.raises(ctl.SpecError, match=r"which module is the head; \['2'\] may be"):
        ctl.adapt(body(), body(), [ctl.FeatureExtraction()])
    assert ctl.adapt(body(), body(), [ctl.FeatureExtraction()], head=["2"]).plan.fresh == ("2.weight", "2.bias")
    assert ctl.adapt(body(), body(), [ctl.L2SP()]).plan.fresh == ()


class Boxes(nn.Module):
    """Boxes chosen by their scores, as a detector returns them: both weights lead to both outputs."""

    def __init__(self):
        super().__init__()
        self.body, self.scores = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
        self.boxes = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))

    def forward(self, x):
        x = self.body(x).tanh()
        scores, boxes = self.scores(x), self.boxes(x)
        chosen = scores[:, 0].argsort()
        return [{"boxes": boxes[chosen], "scores": scores[chosen]}]


@pytest.mark.parametrize("example", [X, None])
def test_scores_that_choose_boxes(example):
    with pytest.raises(ctl.SpecError, match=r"\['scores.1', 'boxes.1'\]"):
        _ = drawn(Boxes(), example).head


def test_two_weights_of_one_output():
    """Of a sum of a wide and a deep map both compute the output; of attention, its output projection."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.body, self.deep = nn.Linear(4, 3), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.wide(x) + self.deep(self.body(x).tanh())

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    with pytest.raises(ctl.SpecError, match=r"\['wide', 'deep'\]"):
        _ = drawn(Wide(), X).head
    assert drawn(Attention(), X).head_module == "attention.out_proj"


def test_detectors_list_scores_and_boxes():
    detection = pytest.importorskip("torchvision").models.detection
    heads = {
        "retinanet_resnet50_fpn": ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"],
        "keypointrcnn_resnet50_fpn": [
            "roi_heads.box_predictor.cls_score",
            "roi_heads.box_predictor.bbox_pred",
            "roi_heads.keypoint_predictor.kps_score_lowres",
        ],
    }
    for name, listed in heads.items():
        with torch.device("meta"):
            model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=2)
        with pytest.raises(ctl.SpecError, match=re.escape(str(listed))):
            _ = drawn(model).head


def test_an_auxiliary_classifier_without_an_example():
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        inception = models.inception_v3(weights=None, init_weights=False, num_classes=3)
    with pytest.raises(ctl.SpecError, match=r"\['AuxLogits.fc', 'fc'\]"):
        _ = drawn(inception).head


def test_deeplab_lists_both():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, aux_loss=True, num_classes=3
    )
    with pytest.raises(ctl.SpecError, match=r"\['classifier.4', 'aux_classifier.4'\]"):
        _ = drawn(model).head
    assert drawn(model, head=["classifier.4"]).head == ("classifier.4.weight", "classifier.4.bias")


@pytest.mark.parametrize("shape", [(8, 1), (1, 1)])
def test_a_head_of_one_output_is_found_in_a_forward_pass(shape):
    """Regression and binary scores: a weight of (1, n) is a weight."""
    model = nn.Sequential(nn.Linear(4, shape[0]), nn.ReLU(), nn.Linear(*shape))
    heads = {info.head for layer in find_layers(model, torch.zeros(2, 4)) for info in layer.parameters}
    assert heads == {None, "2"}
