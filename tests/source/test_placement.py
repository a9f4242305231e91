"""Encoders saved without the prefix of the model they go into, and the other way round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.source.read import own_tensors, read_source
from conservtl.testing.weights import random_weights


def encoder(width=4):
    """26 tensors: four blocks of a linear layer, a batch norm with its buffers, less the last bias."""
    blocks = (nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()) for _ in range(4))
    return nn.Sequential(*blocks)


class Classifier(nn.Module):
    def __init__(self, name="bert", classes=3):
        super().__init__()
        self.add_module(name, encoder())
        self.classifier = nn.Linear(4, classes)
        self._name = name

    def forward(self, x):
        return self.classifier(getattr(self, self._name)(x))


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def holds(module, state):
    own = module.state_dict()
    return all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in state.items())


@pytest.fixture
def plain():
    return random_weights(encoder(), 1)


class TestAPrefixToPut:
    @pytest.mark.parametrize("name", ["bert", "backbone", "model", "module"])
    def test_an_encoder_in_a_classifier(self, name, plain):
        """Parameters and buffers; the head is fresh, and everything of the encoder has an anchor."""
        model = Classifier(name)
        adaptation = ctl.adapt(model, plain, [ctl.L2SP(alpha=1.0)])
        assert holds(getattr(model, name), plain)
        assert adaptation.plan.fresh == ("classifier.weight", "classifier.bias")
        assert not adaptation.transfer.unused
        assert f"source  put the names under '{name}.'" in str(adaptation.plan)
        before = adaptation.penalty().item()  # decay of the head
        with torch.no_grad():
            getattr(model, name)[0][0].weight += 1
        assert adaptation.penalty().item() - before == pytest.approx(16 / 2, rel=1e-5)

    @pytest.mark.parametrize("wrapper", ["module.", "model.", "module.model."])
    def test_behind_the_prefix_of_a_wrapper(self, wrapper, plain):
        model = Classifier()
        adaptation = ctl.adapt(model, under(wrapper, plain))
        assert holds(model.bert, plain)
        assert f"source  stripped the prefix {wrapper!r}\nsource  put the names under 'bert.'" in str(adaptation.plan)

    def test_deep_inside(self, plain):
        model = nn.ModuleDict({"net": nn.ModuleDict({"body": Classifier("trunk")}), "extra": nn.Linear(2, 2)})
        adaptation = ctl.adapt(model, plain, allow=["extra"])
        assert holds(model["net"]["body"].trunk, plain)
        assert "under 'net.body.trunk.'" in str(adaptation.plan)

    def test_a_source_model(self, plain):
        """Its structure is compared under the new names, and a term runs it."""
        source, model, x = encoder(), Classifier(), torch.randn(5, 4)
        source.load_state_dict(plain)
        adaptation = ctl.adapt(model, source, [ctl.FeatureConservation(alpha=1.0)], example=x)
        assert holds(model.bert, plain)
        assert adaptation.loss(torch.zeros(()), model.eval()(x), x).item() == pytest.approx(0, abs=1e-9)
        source[2][1] = nn.GroupNorm(2, 4)
        with pytest.raises(ctl.SourceError, match=r"'bert\.2\.1': norm BatchNorm1d here, GroupNorm in the source"):
            ctl.adapt(Classifier(), source)

    @pytest.mark.parametrize("fresh", [[], ["head"]])
    def test_outputs_of_an_encoder_are_not_compared(self, fresh, plain):
        """A source model with a random head would answer; nothing that it says is the source's."""
        message = r"OutputConservation compares outputs.*'classifier\.weight' is not among the source's tensors"
        for source in (plain, encoder()):
            with pytest.raises(ctl.SourceError, match=message):
                ctl.adapt(Classifier(), source, [ctl.OutputConservation()], fresh=fresh)

    def test_a_head_that_matches_nothing_is_left(self, plain):
        """A projection beside the encoder; names outside the submodule that the model has as well stay there."""
        model = Classifier()
        head = {"projector.weight": torch.ones(2, 4), "classifier.weight": torch.ones(3, 4)}
        adaptation = ctl.adapt(model, plain | head)
        assert holds(model.bert, plain)
        assert torch.equal(model.classifier.weight, head["classifier.weight"])
        assert adaptation.transfer.unused == ("bert.projector.weight",)
        assert adaptation.plan.fresh == ("classifier.bias",)

    def test_a_position_table_of_another_size(self, plain):
        """One of 25 names does not fit by shape; it is under the prefix all the same, and said to differ."""
        model = Classifier()
        model.bert.register_parameter("table", nn.Parameter(torch.zeros(7, 4)))
        adaptation = ctl.adapt(model, plain | {"table": torch.ones(9, 4)})
        assert adaptation.plan["bert.table"].source_shape == (9, 4)
        assert holds(model.bert, plain)

    def test_tied_weights(self):
        """Saved once, under either of their names, as safetensors needs it."""

        class Decoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.body = nn.Embedding(9, 4), encoder()
                self.out = nn.Linear(4, 9, bias=False)
                self.out.weight = self.embed.weight

        for dropped in ("embed.weight", "out.weight"):
            model = nn.ModuleDict({"decoder": Decoder(), "value": nn.Linear(4, 1)})
            saved = random_weights(Decoder(), 1)
            saved["out.weight"] = saved["embed.weight"]
            del saved[dropped]
            adaptation = ctl.adapt(model, saved)
            assert holds(model["decoder"], saved)
            assert model["decoder"].out.weight is model["decoder"].embed.weight
            assert adaptation.plan.fresh == ("value.weight", "value.bias")

    def test_one_encoder_under_two_names_is_one(self, plain):
        shared = encoder()
        model = nn.ModuleDict({"left": shared, "right": shared, "head": nn.Linear(8, 2)})
        adaptation = ctl.adapt(model, plain)
        assert holds(shared, plain)
        assert adaptation.plan.fresh == ("head.weight", "head.bias")

    @pytest.mark.filterwarnings("ignore:.*weight_norm")
    def test_hooks_for_loading_run_on_the_new_names(self):
        """A weight norm of the older kind, in a model that has the parametrization."""
        old, new = (
            nn.Sequential(*(norm(nn.Linear(4, 4)) if i == 1 else nn.Linear(4, 4) for i in range(6)))
            for norm in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm)
        )
        model, x = nn.ModuleDict({"body": new, "head": nn.Linear(4, 2)}), torch.randn(3, 4)
        adaptation = ctl.adapt(model, old.state_dict())
        torch.testing.assert_close(new(x), old(x))
        assert adaptation.plan.fresh == ("head.weight", "head.bias")

    def test_into_tensors_without_a_model(self, plain):
        assert set(read_source(plain).matched(Classifier().state_dict()).tensors) == set(under("bert.", plain))


class TestAPrefixToRemove:
    @pytest.mark.parametrize("prefix", ["bert.", "backbone.", "net.encoder.", "module.bert.", "encoder.module."])
    def test_a_full_model_in_a_bare_encoder(self, prefix, plain):
        model = encoder()
        head = {"classifier.weight": torch.ones(3, 4), "classifier.bias": torch.ones(3)}
        adaptation = ctl.adapt(model, under(prefix, plain) | head, [ctl.L2SP()])
        assert holds(model, plain)
        assert not adaptation.transfer.unused
        assert f"source  stripped the prefix {prefix!r}, left out 2 tensors without it, 15 of" in str(adaptation.plan)
        assert not adaptation.plan.fresh

    def test_a_source_model(self, plain):
        source, model, x = Classifier(), encoder(), torch.randn(5, 4)
        source.bert.load_state_dict(plain)
        ctl.adapt(model, source)
        torch.testing.assert_close(model.eval()(x), source.bert.eval()(x))

    def test_a_head_of_the_models_own(self, plain):
        model = nn.Sequential(*encoder(), nn.Linear(4, 7))
        adaptation = ctl.adapt(model, under("student.", plain) | {"student.head.weight": torch.ones(5, 4)})
        assert holds(model[:4], plain)
        assert adaptation.plan.fresh == ("4.weight", "4.bias")


class TestWhatIsNotClear:
    def test_two_sources_in_one_file(self, plain):
        source = under("student.", plain) | under("teacher.", random_weights(encoder(), 2))
        message = r"without the prefix 'student\.' they give 28 of the model's 28.*'teacher\.' 28\. Choose: prefix='stu"
        with pytest.raises(ctl.SourceError, match=message):
            ctl.adapt(encoder(), source)
        model = encoder()
        ctl.adapt(model, source, prefix="teacher.")
        assert holds(model, random_weights(encoder(), 2))

    @pytest.mark.parametrize("wrapper", ["", "module."])
    def test_two_places_in_the_model(self, wrapper, plain):
        def siamese():
            return nn.ModuleDict({"left": encoder(), "right": encoder(), "head": nn.Linear(8, 2)})

        model = siamese()
        with pytest.raises(
            ctl.SourceError, match=r"under 'left\.' they give 28 .*under 'right\.' 28\. Choose"
        ) as error:
            ctl.adapt(model, under(wrapper, plain))
        suggestion = eval(str(error.value).split("rename=")[2].split(" (in a")[0])
        ctl.adapt(model, under(wrapper, plain), rename=suggestion, allow=["left"])
        assert holds(model["right"], plain)
        assert not holds(model["left"], plain)

    def test_blocks_of_one_shape_are_no_second_place(self):
        """A block's tensors fit each other block too; fewer names than the whole encoder's."""
        body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
        model = nn.ModuleDict({"body": body, "head": nn.Linear(4, 2)})
        saved = random_weights(body, 1)
        ctl.adapt(model, saved)
        assert holds(body, saved)

    def test_nothing_is_moved_where_names_are_the_models(self, plain):
        """Also where the same tensors would fit a second module."""
        model = nn.ModuleDict({"a": encoder(), "b": nn.ModuleDict({"a": encoder()})})
        adaptation = ctl.adapt(model, under("a.", plain) | under("b.a.", plain))
        assert "put the names" not in str(adaptation.plan)
        assert "stripped" not in str(adaptation.plan)

    def test_another_architecture_stays_refused(self, plain):
        model = nn.ModuleDict({"body": encoder(6), "head": nn.Linear(6, 2)})
        with pytest.raises(ctl.SourceError, match="nothing would be loaded"):
            ctl.adapt(model, plain)

    def test_two_claims_to_one_name_are_not_decided(self, plain):
        source = under("net.", plain) | {"0.0.bias": torch.ones(4)}
        with pytest.raises(ctl.SourceError, match=r"it gives 1 with 4"):
            ctl.adapt(encoder(), source)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("whole", "bare", "prefix", "sizes"),
    [
        ("BertForSequenceClassification", "BertModel", "bert", {}),
        ("RobertaForTokenClassification", "RobertaModel", "roberta", {}),
        ("GPT2LMHeadModel", "GPT2Model", "transformer", {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11}),
        ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Model", "wav2vec2", {"conv_dim": [8] * 7,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}),
    ],
)  # fmt: skip
def test_models_of_hugging_face(whole, bare, prefix, sizes):
    """An encoder folder's names in the model with a head, and that model's in the encoder."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = getattr(transformers, whole).config_class(**(sizes if "n_embd" in sizes else small | sizes))
    model, inner = getattr(transformers, whole)(config), getattr(transformers, bare)(config)
    assert model.base_model_prefix == prefix
    saved = {name: tensor.clone() for name, tensor in own_tensors(inner).items()}
    for source in (saved, under("module.", saved)):
        adaptation = ctl.adapt(model, source)
        assert f"put the names under '{prefix}.'" in str(adaptation.plan)
        assert {row.name for row in adaptation.plan.rows if row.name.startswith(prefix) and row.fresh} <= {
            f"{prefix}.pooler.dense.weight", f"{prefix}.pooler.dense.bias"
        }  # fmt: skip
        assert not adaptation.transfer.unused or "pooler" in adaptation.transfer.unused[0]
    whole_state = random_weights(model, 3)
    other = getattr(transformers, bare)(config)
    adaptation = ctl.adapt(other, whole_state)
    for name, tensor in own_tensors(other).items():
        if f"{prefix}.{name}" in whole_state:
            assert torch.equal(tensor, whole_state[f"{prefix}.{name}"]), name
    assert f"stripped the prefix '{prefix}.'" in str(adaptation.plan)
