"""Labels in a dictionary of the model's arguments reach the models that need them, and no other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.functions import forward
from conservtl.labels import labels_for_loss
from conservtl.methods.output_conservation import kl_to_source

X = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(0))
Y = torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(1))


@dataclass
class Outputs:
    logits: Tensor
    loss: Tensor | None = None


class Classifier(nn.Module):
    """Gives its loss where it gets labels, as Hugging Face's models do; records what it got."""

    def __init__(self, seed=0, classes=5):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, classes)
        self.seen: list[bool] = []

    def forward(self, input_ids, labels=None):
        self.seen.append(labels is not None)
        logits = self.head(self.mix(self.embed(input_ids)).mean(1))
        return Outputs(logits, None if labels is None else F.cross_entropy(logits, labels))


class Required(Classifier):
    def forward(self, input_ids, labels):
        return super().forward(input_ids, labels)


class Seq2Seq(nn.Module):
    """Decoder inputs are labels, shifted; without labels or decoder inputs another sequence is decoded."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def decode(self, input_ids, tokens):
        return self.head(self.mix(self.embed(tokens) + self.embed(input_ids).mean(1, keepdim=True)).tanh())

    def forward(self, input_ids, decoder_input_ids=None, labels=None):
        if decoder_input_ids is None:
            decoder_input_ids = input_ids if labels is None else F.pad(labels.clamp(0)[:, :-1], (1, 0))
        return self.decode(input_ids, decoder_input_ids)


class Failing(Seq2Seq):
    """Names no decoder's inputs; fails without labels."""

    def forward(self, input_ids, labels=None):
        if labels is None:
            raise ValueError("specify labels")
        return self.decode(input_ids, F.pad(labels.clamp(0)[:, :-1], (1, 0)))


class Starting(Seq2Seq):
    """Names no decoder's inputs; without labels gives the first token only."""

    def forward(self, input_ids, labels=None):
        tokens = input_ids[:, :1] * 0 if labels is None else F.pad(labels.clamp(0)[:, :-1], (1, 0))
        return self.decode(input_ids, tokens)


def test_a_model_that_does_not_need_them_gets_none():
    model = Classifier()
    forward(model, {"input_ids": X, "labels": Y[:, 0]})
    assert model.seen == [False]


def test_an_argument_without_a_default_is_needed():
    model = Required()
    assert forward(model, {"input_ids": X, "labels": Y[:, 0]}).loss is not None


def test_a_decoder_gets_its_labels_unless_it_gets_its_inputs():
    model = Seq2Seq()
    assert forward(model, {"input_ids": X, "labels": Y}).shape == (4, 3, 5)
    given = {"input_ids": X, "decoder_input_ids": Y[:, :2], "labels": Y}
    assert forward(model, given).shape == (4, 2, 5)


def test_an_error_that_labels_do_not_mend_is_the_models_own():
    class Broken(nn.Module):
        def forward(self, input_ids, labels=None):
            raise ValueError("broken" if labels is None else "still broken")

    with pytest.raises(ValueError, match=r"^broken$"):
        forward(Broken(), {"input_ids": X, "labels": Y})


def test_the_loss_may_need_them():
    model, batch = Classifier(), {"input_ids": X, "labels": Y[:, 0]}
    labels_for_loss(model, batch, forward, lambda outputs, _: outputs.loss)
    torch.testing.assert_close(forward(model, batch).loss, F.cross_entropy(forward(model, batch).logits, Y[:, 0]))
    plain = Classifier()
    labels_for_loss(plain, batch, forward, lambda outputs, _: outputs.missing)
    assert forward(plain, batch).loss is None


@pytest.mark.parametrize("kind", [Seq2Seq, Failing, Starting])
@pytest.mark.parametrize("loop", ["own", "fit"])
def test_source_and_model_decode_the_same_labels(kind, loop):
    """The term is that of both models on the same decoder inputs."""
    chosen = ctl.OutputConservation(weight=1.0, temperature=1.0)
    adaptation = ctl.adapt(kind(1), kind(0), [chosen])
    with torch.no_grad():
        adaptation.model.mix.bias += 0.3
    tokens = F.pad(Y[:, :-1], (1, 0))
    batch = {"input_ids": X, "labels": Y}
    logits = adaptation.model.decode(X, tokens)
    task = F.cross_entropy(logits.transpose(1, 2), Y)
    term = kl_to_source(logits, kind(0).decode(X, tokens))
    if loop == "own":
        outputs = adaptation.model(**batch)
        task = F.cross_entropy(outputs.transpose(1, 2), Y)
        torch.testing.assert_close(adaptation.loss(task, outputs, batch), task + term)
        return
    training = ctl.Training(epochs=1, batch_size=4, optimizer="sgd", lr=1e-3, device="cpu")
    result = ctl.fit(adaptation, batch, {"target": batch}, training)
    assert result.history[0]["loss"] == pytest.approx((task + term).item(), rel=1e-5)


BATCH = {"input_ids": X, "labels": Y[:, 0]}
LOSS_OF_OUTPUTS = lambda outputs, _: outputs.loss  # noqa: E731


class TestLossOfOutputs:
    """loss=lambda outputs, batch: outputs.loss is the loss written out."""

    @staticmethod
    def plain(outputs, batch):
        return F.cross_entropy(outputs.logits, batch["labels"])

    @pytest.mark.parametrize(
        "chosen",
        [
            ctl.FeatureConservation(attention=True, layers=1),
            ctl.FisherSP(),
            ctl.FisherSP(data="source"),
            ctl.FisherSP(fisher="true"),
        ],
    )
    def test_measurements(self, chosen):
        found = []
        for loss in (self.plain, LOSS_OF_OUTPUTS):
            adaptation = ctl.adapt(Classifier(1), Classifier(0), [chosen])
            on = "source" if getattr(chosen, "data", "") == "source" else "target"
            adaptation.measure([BATCH], on=on, loss=loss)
            found.append(adaptation.measured)
        for name, tensors in found[0].items():
            for key, tensor in tensors.items():
                assert tensor.std() > 0
                torch.testing.assert_close(tensor, found[1][name][key], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        "chosen", [ctl.FeatureConservation(attention=True, layers=1), ctl.OutputConservation(), ctl.L2SP()]
    )
    def test_fit(self, chosen):
        losses = []
        for loss in (self.plain, LOSS_OF_OUTPUTS):
            adaptation = ctl.adapt(Classifier(1), Classifier(0), [chosen])
            training = ctl.Training(epochs=3, batch_size=2, lr=1e-2, device="cpu", keep="target")
            result = ctl.fit(adaptation, BATCH, {"target": BATCH}, training, loss=loss, seed=0)
            losses.append([line["loss"] for line in result.history])
            assert result.history[-1]["target"]["accuracy"] >= 0
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_labels_of_its_own(self):
        """The source's head has other classes: its model gets no labels of the target."""
        source, model = Classifier(0, classes=2), Classifier(1)
        adaptation = ctl.adapt(model, source, [ctl.OutputConservation()])
        training = ctl.Training(epochs=1, batch_size=4, device="cpu")
        ctl.fit(adaptation, BATCH, training=training, loss=LOSS_OF_OUTPUTS)
        assert not any(adaptation.origin.source_model.seen)


class TestHuggingFace:
    @pytest.fixture
    def transformers(self):
        return pytest.importorskip("transformers")

    @pytest.mark.parametrize("family", ["bart", "t5"])
    def test_sequence_to_sequence(self, transformers, family):
        def build(seed):
            torch.manual_seed(seed)
            if family == "t5":
                config = transformers.T5Config(
                    vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
                )
                return transformers.T5ForConditionalGeneration(config).eval()
            config = transformers.BartConfig(
                vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
            )  # fmt: skip
            return transformers.BartForConditionalGeneration(config).eval()

        inputs = torch.randint(3, 20, (2, 7), generator=torch.Generator().manual_seed(0))
        labels = torch.randint(3, 20, (2, 4), generator=torch.Generator().manual_seed(1))
        labels[0, 2:] = -100
        batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}
        source = build(0)
        chosen = ctl.OutputConservation(weight=1.0, temperature=1.0)
        adaptation = ctl.adapt(build(0), source, [chosen], example=batch)
        with torch.no_grad():
            for parameter in adaptation.model.parameters():
                parameter.mul_(1.1)
        outputs = adaptation.model(**batch)
        loss = adaptation.loss(outputs.loss, outputs, batch)
        mask = labels != -100
        ours, theirs = outputs.logits[mask], source(**batch).logits[mask]
        torch.testing.assert_close(loss - outputs.loss, kl_to_source(ours, theirs), rtol=1e-3, atol=1e-5)
        training = ctl.Training(epochs=1, batch_size=2, lr=1e-3, device="cpu", batch_norm="eval")
        ctl.fit(adaptation, batch, {"target": batch}, training, loss=LOSS_OF_OUTPUTS)

    def test_a_token_classifier(self, transformers):
        """Padding has the label -100 and is masked: the mean is over tokens."""

        def build(seed):
            torch.manual_seed(seed)
            config = transformers.BertConfig(
                vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
                max_position_embeddings=64, num_labels=3,
            )  # fmt: skip
            return transformers.BertForTokenClassification(config).eval()

        tokens = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
        labels = torch.randint(3, (2, 6), generator=torch.Generator().manual_seed(1))
        mask = torch.arange(6) < torch.tensor([[3], [6]])
        source, values = build(0), []
        for chosen in (
            ctl.OutputConservation(weight=1.0, temperature=1.0),
            ctl.FeatureConservation(alpha=1.0, layers=2),
        ):
            adaptation = ctl.adapt(build(0), source, [chosen])
            with torch.no_grad():
                for parameter in adaptation.model.parameters():
                    parameter.mul_(1.2)
            model = adaptation.model.eval()
            for width in (6, 30):
                pad = width - 6
                batch = {
                    "input_ids": F.pad(tokens, (0, pad)),
                    "attention_mask": F.pad(mask, (0, pad)).long(),
                    "labels": F.pad(labels.masked_fill(~mask, -100), (0, pad), value=-100),
                }
                outputs = model(**batch)
                values.append((adaptation.loss(outputs.loss, outputs, batch) - outputs.loss).detach())
        inputs = {"input_ids": tokens, "attention_mask": mask.long()}
        kl = kl_to_source(model(**inputs).logits[mask], source(**inputs).logits[mask])
        torch.testing.assert_close(values[0], kl, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(values[3], values[2], rtol=1e-3, atol=1e-6)

        adaptation = ctl.adapt(build(0), source, [ctl.OutputConservation(weight=1.0, temperature=1.0)])
        adaptation.model.load_state_dict(model.state_dict())
        training = ctl.Training(epochs=1, batch_size=2, optimizer="sgd", lr=1e-6, device="cpu")
        batch = {**inputs, "labels": labels.masked_fill(~mask, -100)}
        result = ctl.fit(adaptation, batch, {"target": batch}, training)
        task = F.cross_entropy(model(**inputs).logits[mask], labels[mask])
        assert result.history[0]["target"]["loss"] == pytest.approx(task.item(), rel=1e-3)
