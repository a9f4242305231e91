"""Strategies on recognizers: layers that are dropped at random, units and features of encoders, LoRA, blank frames."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import conservtl as ctl
from conservtl.data import Sequences
from conservtl.tasks.transcribe.conformer import ConformerArgs, ConformerCTC
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.models import ModelSpec, build
from conservtl.tasks.transcribe.task import Transcribe

TASK = Transcribe()
TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "conv_dim": [8, 8],
    "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0,
    "activation_dropout": 0.0, "final_dropout": 0.0,
}  # fmt: skip
WAVES = TranscribePreprocessing(features=Features(kind="waveform", normalise="none"))
NAMES = ["transformers/wav2vec2", "transformers/hubert"]


def batch_of(waves=True):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 900) if waves else (2, 40, 6)
    lengths = torch.tensor([900, 500] if waves else [40, 22])
    inputs = torch.randn(shape, generator=generator)
    inputs[1, int(lengths[1]) :] = 0
    return {
        "inputs": inputs,
        "lengths": lengths,
        "labels": torch.tensor([[1, 2, 1], [3, -100, -100]]),
        "names": ["a", "b"],
    }


def example_of(batch):
    return {name: batch[name] for name in ("inputs", "lengths")}


def recognizer(name, **args):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return build(ModelSpec(name=name, args={**TINY, **args}), WAVES, 5)


def conformer():
    torch.manual_seed(0)
    return ConformerCTC(6, 5, ConformerArgs(width=16, blocks=2, heads=2, subsampling=2, dropout=0.0))


def moved(model, by=0.05):
    other = copy.deepcopy(model)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return other


def encoder_layers(model):
    return next(module for name, module in model.named_modules() if name.endswith("encoder.layers"))


def objective(adaptation, task, outputs, batch):
    source = adaptation.source_view(batch, TASK.forward)
    return adaptation.loss(task, outputs, batch=batch, source=source)


class Draws:
    """torch.rand([]) with given results: what transformers drops layers by."""

    def __init__(self, monkeypatch, values):
        self.values = list(values)
        plain = torch.rand

        def rand(*shape, **options):
            if shape == ([],) and self.values:
                return torch.tensor(self.values.pop(0))
            return plain(*shape, **options)

        monkeypatch.setattr(torch, "rand", rand)


TERMS = {
    "delta": ctl.FeatureConservation(alpha=0.3, layers=("*encoder.layers.*",)),
    "ldifs": ctl.FeatureConservation(alpha=0.3, layers=("*encoder.layers.*",), metric="ldifs"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("term", TERMS)
def test_a_dropped_layer_is_not_compared_and_the_source_drops_none(name, term, monkeypatch):
    """Layer 0 is dropped: the term is that of layer 1 alone, against the whole source model's feature there."""
    model = recognizer(name, layerdrop=0.5)
    source, batch = moved(model), batch_of()
    adaptation = ctl.adapt(model, source, [TERMS[term]], example=example_of(batch))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.train()
    found = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, out, key=key: found.__setitem__(key, out[0] if isinstance(out, tuple) else out)
        )
        for key, module in (
            ("ours 0", encoder_layers(model)[0]),
            ("ours 1", encoder_layers(model)[1]),
            ("theirs 1", encoder_layers(source.eval())[1]),
        )
    ]
    with monkeypatch.context() as patch:
        Draws(patch, [0.1, 0.9])
        outputs = TASK.forward(model, batch)
    loss = objective(adaptation, 0.0 * outputs[0].sum(), outputs, batch)
    with torch.no_grad():
        TASK.forward(source, batch)
    assert "ours 0" not in found
    ours, theirs = found["ours 1"], found["theirs 1"]
    valid = torch.arange(ours.shape[1]) < outputs[1].unsqueeze(1)
    if term == "delta":
        by_hand = 0.3 / 2 * ((ours - theirs) ** 2).sum(-1)[valid].mean()
    else:
        by_hand = 0.3 * ((F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)) ** 2).sum(-1)[valid].mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-3, atol=1e-6)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_the_source_never_drops_layers(name):
    """All layers of the adapted model are dropped; the source's outputs are those of its eval mode."""
    model = recognizer(name, layerdrop=1.0)
    source, batch = moved(model, 0.2), batch_of()
    adaptation = ctl.adapt(
        model, source, [ctl.OutputConservation(weight=700.0, temperature=1.0)], example=example_of(batch)
    )
    model.train()
    outputs = TASK.forward(model, batch)
    task = TASK.loss(outputs, batch)
    loss, task = objective(adaptation, task, outputs, batch).detach(), task.detach()
    with torch.no_grad():
        theirs, lengths = TASK.forward(source.eval(), batch)
    valid = torch.arange(theirs.shape[1]) < lengths.unsqueeze(1)
    divergence = F.kl_div(outputs[0].log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(loss - task, 700 * divergence[valid].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_layerdrop_with_pulls_and_amplitudes(name, monkeypatch):
    """A dropped layer's weights are pulled by L2-SP alone; its amplitudes have no gradient, and stay."""
    model = recognizer(name, layerdrop=0.5)
    batch = batch_of()
    for strategies in ([ctl.L2SP(alpha=0.5)], [ctl.LHUC(freeze=False), ctl.L2SP(alpha=0.5)]):
        ours = copy.deepcopy(model)
        adaptation = ctl.adapt(ours, moved(model), strategies, example=example_of(batch))
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        layers = encoder_layers(ours)
        name_of = {id(parameter): key for key, parameter in ours.named_parameters()}
        with torch.no_grad():
            for parameter in layers[0].parameters():
                parameter.add_(0.01)
        before = {key: value.detach().clone() for key, value in layers[0].named_parameters()}
        ours.train()
        with monkeypatch.context() as patch:
            Draws(patch, [0.1, 0.9])
            outputs = TASK.forward(ours, batch)
        adaptation.loss(TASK.loss(outputs, batch), outputs, batch=batch).backward()
        optimizer.step()
        pulled = 0
        for key, parameter in layers[0].named_parameters():
            whole = name_of[id(parameter)]
            pull = adaptation.plan[whole].pull or 0.0
            expected = before[key] - 0.1 * pull * (0.01 if pull else 0.0)
            torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
            pulled += bool(pull)
        assert pulled


def sequences_of(batch):
    rows = range(len(batch["lengths"]))
    return Sequences(
        tuple(batch["inputs"][row, : batch["lengths"][row]] for row in rows),
        tuple(batch["labels"][row][batch["labels"][row] >= 0] for row in rows),
        tuple(batch["names"]),
        (),
        (0.9, 0.5),
    )


@pytest.mark.parametrize("name", NAMES)
def test_fit_with_layerdrop_and_all_terms(name):
    model = recognizer(name, layerdrop=0.5)
    batch = batch_of()
    strategies = [
        ctl.L2SP(alpha=0.1), ctl.OutputConservation(rho=0.2, blank=0), ctl.FeatureConservation(attention=True),
        ctl.LHUC(freeze=False),
    ]  # fmt: skip
    adaptation = ctl.adapt(model, moved(model), strategies, example=example_of(batch))
    training = ctl.Training(device="cpu", epochs=4, batch_size=1, lr=0.01)
    result = ctl.fit(adaptation, sequences_of(batch), training=training, forward=TASK.forward, loss=TASK.loss, seed=1)
    assert torch.tensor([line["loss"] for line in result.history]).isfinite().all()


def test_units_of_every_encoder_block_have_amplitudes():
    """Doubling a unit's amplitude from 1 to 2 doubles its column in the next map, by hand."""
    model, batch = conformer(), batch_of(waves=False)
    plain = copy.deepcopy(model).eval()
    adaptation = ctl.adapt(model, plain, [ctl.LHUC()], example=example_of(batch))
    names = [name for name in adaptation.plan.trained if name.endswith("lhuc")]
    for number in range(2):
        assert any(name.startswith(f"blocks.{number}.") for name in names)
    assert not any(name.startswith("head") for name in names)
    name = next(name for name in names if name.startswith("blocks.0.feed_forward1.1"))
    with torch.no_grad():
        model.get_parameter(name)[3] = 40.0  # 2 sigmoid(40) = 2
        changed = TASK.forward(model.eval(), batch)[0]
        hidden = plain.blocks[0].feed_forward1[1]
        hidden.weight[3] *= 2
        hidden.bias[3] *= 2
        by_hand = TASK.forward(plain, batch)[0]
    torch.testing.assert_close(changed, by_hand, rtol=1e-4, atol=1e-5)


def test_features_are_transformed_and_frames_are_not():
    """x' = x + D x + b in each frame; padding stays masked, so that an utterance alone has the same outputs."""
    model, batch = conformer(), batch_of(waves=False)
    plain = copy.deepcopy(model).eval()
    adaptation = ctl.adapt(model, plain, [ctl.InputTransform()], example=example_of(batch))
    assert adaptation.plan.trained == ("input_transform.weight", "input_transform.bias")
    transform = model.input_transform
    assert transform.weight.shape == (6, 6)
    with torch.no_grad():
        transform.weight.normal_()
        transform.bias.normal_()
        ours = TASK.forward(model.eval(), batch)[0]
        inputs = batch["inputs"] + batch["inputs"] @ transform.weight.T + transform.bias
        by_hand = TASK.forward(plain, {**batch, "inputs": inputs})[0]
        alone = {"inputs": batch["inputs"][1:, :22], "lengths": batch["lengths"][1:]}
        other = TASK.forward(model, alone)[0]
    torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1:, : other.shape[1]], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dim", "waves", "message"),
    [
        (1, False, r"dim=1 must be an axis of features; of inputs \(2, 40, 6\) with lengths .*Choose dim=-1"),
        (None, True, r"of inputs \(2, 900\) with lengths .*Take features instead of samples"),
    ],
)
def test_a_transform_over_time_is_refused(dim, waves, message):
    batch = batch_of(waves)
    model = recognizer("transformers/wav2vec2") if waves else conformer()
    with pytest.raises(ctl.SpecError, match=message):
        ctl.adapt(model, copy.deepcopy(model), [ctl.InputTransform(dim=dim)], example=example_of(batch))


@pytest.mark.parametrize("form", ["kl", "mixed labels"])
def test_frames_at_which_the_source_hears_a_blank_are_left_out(form):
    """By hand, over the frames that are neither padding nor blank."""
    model, batch = conformer(), batch_of(waves=False)
    source = moved(model, 0.3)
    fields = {"weight": 0.6, "temperature": 2.0} if form == "kl" else {"rho": 0.3}
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation(blank=0, **fields)], example=example_of(batch))
    assert "without its answers 0" in str(adaptation.plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    outputs = TASK.forward(model, batch)
    task = TASK.loss(outputs, batch)
    loss, task = objective(adaptation, task, outputs, batch).detach(), task.detach()
    ours = outputs[0].detach()
    with torch.no_grad():
        theirs, lengths = TASK.forward(source.eval(), batch)
    frames = [
        (row, frame) for row in range(2) for frame in range(int(lengths[row])) if int(theirs[row, frame].argmax()) != 0
    ]
    assert 0 < len(frames) < int(lengths.sum())
    total = 0.0
    for row, frame in frames:
        if form == "kl":
            target = (theirs[row, frame] / 2).softmax(0)
            total += 4 * float((target * (target.log() - (ours[row, frame] / 2).log_softmax(0))).sum())
        else:
            total -= float((theirs[row, frame].softmax(0) * ours[row, frame].log_softmax(0)).sum())
    share = total / len(frames)
    by_hand = float(task) + 0.6 * share if form == "kl" else 0.7 * float(task) + 0.3 * share
    assert float(loss) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize(
    ("blank", "outputs", "message"),
    [
        (5, (2, 3, 5), r"blank must be one of 5 classes; received 5"),
        (0, (2, 5), r"blank is a class of logits with positions, .*outputs of shape \(2, 5\)"),
    ],
)
def test_a_blank_that_is_none_is_refused(blank, outputs, message):
    model = torch.nn.Linear(4, 5)
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.OutputConservation(blank=blank, form="softmax")])
    inputs = torch.randn(*outputs[:-1], 4)
    logits = model(inputs)
    with pytest.raises(ctl.SpecError, match=message):
        adaptation.loss(logits.square().mean(), logits, inputs)


def test_lora_on_a_recognizer():
    """The base stays; terms compare with it, its adapter off and no layer dropped, over frames that are no blank."""
    peft = pytest.importorskip("peft")
    from conservtl.integrations.peft import adapt

    base = recognizer("transformers/wav2vec2", layerdrop=0.5)
    batch = batch_of()
    before = copy.deepcopy(base).eval()
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    strategies = [ctl.L2SP(alpha=0.1), ctl.OutputConservation(weight=0.4, temperature=1.0, blank=0)]
    adaptation = adapt(wrapped, strategies, example=example_of(batch))
    assert all("lora_" in name for name in adaptation.plan.trained)
    assert len(adaptation.plan.trained) == 8
    training = ctl.Training(device="cpu", epochs=3, batch_size=2, lr=0.02, checkpointing=True)
    ctl.fit(adaptation, sequences_of(batch), training=training, forward=TASK.forward, loss=TASK.loss, seed=0)
    assert any(float(value) > 0 for value in adaptation.drift().values())
    wrapped.eval()
    with torch.no_grad():
        theirs = TASK.forward(before, batch)[0]
        view = adaptation.source_view(batch, TASK.forward)
        ours = TASK.forward(wrapped, batch)[0]
        merged = TASK.forward(adaptation.merged().eval(), batch)[0]
    torch.testing.assert_close(view.outputs[0], theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, theirs, atol=1e-4)
    torch.testing.assert_close(merged, ours, rtol=1e-3, atol=1e-4)


def test_lora_from_a_spec_on_a_recognizer():
    """Two kinds of projections by globs; the source is compared with, the head stays, and the change is merged."""
    base, batch = recognizer("transformers/wav2vec2"), batch_of()
    before = copy.deepcopy(base.eval())
    lora = {"kind": "lora", "rank": 2, "on": ["*.q_proj", "*.v_proj"]}
    strategies = [lora, {"kind": "l2_sp", "alpha": 0.1}, {"kind": "output_conservation", "weight": 0.4}]
    adaptation = ctl.adapt(base, before, strategies, example=example_of(batch))
    assert len(adaptation.plan.trained) == 8
    training = ctl.Training(device="cpu", epochs=2, batch_size=2, lr=0.02, checkpointing=True)
    ctl.fit(adaptation, sequences_of(batch), training=training, forward=TASK.forward, loss=TASK.loss, seed=0)
    merged = adaptation.merged()
    moved = {name for name, value in before.state_dict().items() if not torch.equal(merged.state_dict()[name], value)}
    attention = "network.wav2vec2.encoder.layers.{}.attention.{}_proj.weight"
    assert moved == {attention.format(block, name) for block in (0, 1) for name in "qv"}
    with torch.no_grad():
        ours, plain = TASK.forward(base.eval(), batch)[0], TASK.forward(merged.eval(), batch)[0]
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-5)
