"""Recognizers on samples of torchaudio and transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.experiments.run.evaluation_sets import score_on_tests
from conservtl.experiments.run.runner import plan_of
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import load_spec
from conservtl.layers import find_layers
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.masked_layers import MaskedGroupNorm1d
from conservtl.tasks.transcribe.models import ModelSpec, build
from conservtl.tasks.transcribe.waveform_models import bundle_labels

torchaudio = pytest.importorskip("torchaudio")
transformers = pytest.importorskip("transformers")
pytest.importorskip("jiwer")
soundfile = pytest.importorskip("soundfile")

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

EXAMPLE = Path(__file__).parents[3] / "examples" / "speech" / "librispeech.yaml"
WAVES = TranscribePreprocessing(features=Features(kind="waveform", normalise="none"))
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
TINY_AUDIO = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [[8, 10, 5], [8, 3, 2]],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 16,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 4,
    "encoder_pos_conv_groups": 2,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 16,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False,
}
NETWORKS = {
    "transformers/wav2vec2": TINY,
    "transformers/hubert": TINY,
    "transformers/wavlm": TINY,
    "transformers/data2vec-audio": {**TINY, "num_conv_pos_embeddings": 1},
    "wav2vec2_model": TINY_AUDIO,
    "wavlm_model": {**TINY_AUDIO, "encoder_num_buckets": 8, "encoder_max_distance": 20},
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return build(ModelSpec(name=request.param, args=NETWORKS[request.param]), WAVES, 7).eval()


def test_an_utterance_has_the_same_outputs_alone_and_padded(network):
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(2, 900, generator=generator)
    lengths = torch.tensor([900, 431])
    waves[1, 431:] = 0
    with torch.no_grad():
        both, frames = network(waves, lengths)
        alone, _ = network(waves[1:, :431], lengths[1:])
    # frames = floor((floor((L - 10) / 5) + 1 - 3) / 2) + 1
    assert frames.tolist() == [89, 42]
    torch.testing.assert_close(both[1, :42], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "args", "frames"),
    [
        ("data2vec-audio", {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}, [89, 43]),
        ("wav2vec2-conformer", {"conv_depthwise_kernel_size": 5, "conformer_conv_dropout": 0.0}, [89, 43]),
        ("wav2vec2-conformer", {"conv_depthwise_kernel_size": 5, "position_embeddings_type": "rotary"}, [89, 43]),
        ("hubert", {"conv_pos_batch_norm": True}, [89, 43]),
        ("sew", {"squeeze_factor": 2}, [88, 42]),  # the last frame of an odd number has no output
        ("wav2vec2", {"add_adapter": True, "num_adapter_layers": 2, "layerdrop": 1.0}, [23, 11]),
    ],
)
def test_convolutions_and_norms_within_an_encoder_leave_out_padding(kind, args, frames):
    """Also where transformers lets padding in, and in the statistics of a batch norm that is trained."""
    torch.manual_seed(0)
    network = build(ModelSpec(name=f"transformers/{kind}", args={**TINY, **args}), WAVES, 7).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    waves = torch.randn(2, 900)
    lengths = torch.tensor([900, 445])
    with torch.no_grad():
        both, counts = network(waves, lengths)
        alone, _ = network(waves[1:, :445], lengths[1:])
    assert counts.tolist() == frames
    assert alone.std() > 0.01
    torch.testing.assert_close(both[1, : frames[1]], alone[0, : frames[1]], rtol=1e-3, atol=1e-5)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    means = []
    for padding in (0, 300):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        with torch.no_grad():
            network(nn.functional.pad(waves, (0, padding), value=9.0), lengths)
        means.append([norm.running_mean.clone() for norm in norms])
    torch.testing.assert_close(means[0], means[1])
    assert network.train()(waves, lengths)[0].shape[1] - frames[0] in (0, 1)  # no layer that halves them is dropped


def test_padding_is_no_key_of_torchaudios_wavlm_whose_first_layer_is_dropped(monkeypatch):
    """The first layer gives the others their biases of positions; without it they see no padding either."""
    torch.manual_seed(0)
    args = {**NETWORKS["wavlm_model"], "encoder_layer_drop": 0.5}
    network = build(ModelSpec(name="wavlm_model", args=args), WAVES, 7).train()
    waves, lengths = torch.randn(2, 900), torch.tensor([900, 431])

    def outputs(*batch):
        draws = iter((0.1, 0.9))
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch, "rand", lambda *_: torch.tensor([next(draws)]))
            return network(*batch)[0][-1, :42]

    torch.testing.assert_close(outputs(waves, lengths), outputs(waves[1:, :431], lengths[1:]), rtol=1e-4, atol=1e-5)
    plain = torchaudio.models.wavlm_model(**args, aux_num_out=7).eval()
    plain.load_state_dict(network.network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(waves, torch.tensor([900, 900]))[0], plain(waves)[0])


def test_layers_run_from_the_convolutions_to_the_head(network):
    layers = find_layers(network, {"inputs": torch.zeros(2, 900), "lengths": torch.tensor([900, 500])})
    assert "conv_layers.0" in layers[0].name
    assert layers[-1].name.rpartition(".")[2] in ("lm_head", "aux")
    assert sum("layers.1" in layer.name and "encoder" in layer.name for layer in layers) == 1


def test_a_copy_is_told_its_own_lengths(network):
    other = copy.deepcopy(network)
    waves = torch.randn(1, 300)
    with torch.no_grad():
        network(waves, torch.tensor([200]))
        other(waves, torch.tensor([300]))
    first = [norm for norm in network.modules() if isinstance(norm, MaskedGroupNorm1d)]
    assert all(norm.lengths.tolist() == [39] for norm in first)  # (200 - 10) // 5 + 1


def test_the_masked_norm_is_a_group_norm_of_what_is_no_padding():
    torch.manual_seed(0)
    norm = MaskedGroupNorm1d(nn.GroupNorm(3, 3))
    nn.init.normal_(norm.weight)
    inputs = torch.randn(2, 3, 9)
    norm.lengths = torch.tensor([9, 5])
    plain = nn.functional.group_norm
    expected = [plain(inputs[n : n + 1, :, :frames], 3, norm.weight, norm.bias) for n, frames in ((0, 9), (1, 5))]
    torch.testing.assert_close(norm(inputs)[0], expected[0][0])
    torch.testing.assert_close(norm(inputs)[1, :, :5], expected[1][0])


def test_pretrained_weights_of_transformers_are_read_below_the_network():
    plain = transformers.AutoModelForCTC.from_config(
        transformers.AutoConfig.for_model("wav2vec2", **TINY, vocab_size=7)
    )
    network = build(ModelSpec(name="transformers/wav2vec2", args=TINY), WAVES, 7)
    plan = ctl.adapt(network, plain).plan
    assert {row.origin for row in plan.rows} == {"source"}
    state = network.state_dict()
    assert all(torch.equal(state["network." + name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    ("model", "features", "message"),
    [
        ({"name": "transformers/whale"}, {}, r"model.name must be transformers/TYPE .*received 'transformers/whale'"),
        ({"name": "transformers/parakeet_ctc"}, {}, r"that takes samples"),
        ({"name": "transformers/hubert", "args": {"hiden_size": 3}}, {}, r"no field 'hiden_size'.*hidden_size"),
        ({"name": "transformers/hubert"}, {"kind": "logmel"}, r"data.features.kind must be 'waveform'"),
        ({"name": "wav2vec2_bas"}, {}, r"Did you mean 'wav2vec2_base'"),
        ({"name": "wav2vec2_base", "args": {"depth": 3}}, {}, r"cannot be built with .*It takes: "),
        ({"name": "WAV2VEC2_ASR_BASE_960H"}, {"sample_rate": 8000}, r"sample_rate must be 16000, at which WAV2VEC2"),
        ({"name": "WAV2VEC2_ASR_BASE_960H"}, {"normalise": "bands"}, r"normalise must be 'none', as WAV2VEC2"),
        ({"name": "HUBERT_ASR_LARGE"}, {}, r"normalise must be 'mean_variance', as HUBERT"),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_to_change(model, features, message):
    settings = Features(**{"kind": "waveform", "normalise": "none", **features})
    with pytest.raises(ctl.SpecError, match=message):
        build(ModelSpec(**model), TranscribePreprocessing(features=settings), 7)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two speakers of noise in LibriSpeech's layout."""
    root = tmp_path_factory.mktemp("waves")
    for speaker in ("11", "22"):
        folder = root / "test-clean" / speaker / "1"
        folder.mkdir(parents=True)
        lines = []
        for number, text in enumerate(("A CAB", "BAD", "A BEE", "DEED", "CAB")):
            name = f"{speaker}-1-{number:04}"
            generator = torch.Generator().manual_seed(number + 10 * int(speaker))
            soundfile.write(folder / f"{name}.flac", torch.randn(3200 + 800 * number, generator=generator) / 9, 16_000)
            lines.append(f"{name} {text}")
        (folder / f"{speaker}-1.trans.txt").write_text("\n".join(lines))
    return root


def overrides(root, *more):
    return [f"data.root={root}", "data.target='22'", "data.shots=3", "data.held_out=0.5", "training.epochs=1", *more]


def test_a_network_of_transformers_is_trained_with_terms_and_scored(root, tmp_path):
    model = f"model={json.dumps({'name': 'transformers/wavlm', 'args': TINY})}"
    given = overrides(root, model, "source.weights=null", f"source.cache={tmp_path}", "training.evaluate_every=1")
    terms = [{"kind": "output_conservation", "rho": 0.3}, {"kind": "feature_conservation"}]
    given += [f"strategies={json.dumps(terms)}", "source.training={epochs: 1, batch_size: 4}"]
    setting = prepare(load_spec(EXAMPLE, given))
    source = obtain_source(setting)
    adaptation = setting.adaptation(source.with_notes())
    before = {name: value.clone() for name, value in adaptation.model.state_dict().items()}
    setting.fit(adaptation, setting.domains.shots)
    changed = {name for name, value in adaptation.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"network.lm_head.weight", "network.wavlm.encoder.layers.1.attention.q_proj.weight"} <= changed
    scores = score_on_tests(setting, source, adaptation.model)["target"].metrics
    assert set(scores) == {"loss", "wer", "cer"}
    assert torch.tensor(list(scores.values())).isfinite().all()


def test_a_bundle_brings_its_characters_and_takes_its_weights(root, tmp_path, monkeypatch):
    """The example on LibriSpeech, with a small network in the place of the bundle's."""

    def small(**options):
        return torchaudio.models.wav2vec2_model(**TINY_AUDIO, **options)

    monkeypatch.setattr(torchaudio.models, "wav2vec2_base", small)
    torch.manual_seed(0)
    weights = small(encoder_layer_drop=0.0, aux_num_out=29)
    torch.save(weights.state_dict(), tmp_path / "weights.pt")
    given = overrides(root, f"source.weights={tmp_path / 'weights.pt'}")
    setting = prepare(load_spec(EXAMPLE, given))
    labels = torchaudio.pipelines.WAV2VEC2_ASR_BASE_960H.get_labels()
    assert setting.domains.labels == ("<blank>", *labels[1:])
    plan = plan_of(load_spec(EXAMPLE, given))
    frozen = {row.layer for row in plan.rows if row.frozen}
    assert frozen == {f"network.feature_extractor.conv_layers.{number}" for number in (0, 1)}
    assert torch.equal(obtain_source(setting).model.network.aux.weight, weights.aux.weight)
    with pytest.raises(ctl.SpecError, match=r"data.tokens.alphabet must hold the characters of WAV2VEC2"):
        prepare(load_spec(EXAMPLE, [*given, "data.tokens={kind: characters, alphabet: ' ABCDE'}"]))
    with pytest.raises(ctl.DataError, match=r"characters outside the vocabulary"):
        prepare(load_spec(EXAMPLE, [*given, "data.text.case=lower"]))


def test_a_processor_beside_weights_brings_its_tokens_and_settles_the_features(root, tmp_path):
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDE"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    config = transformers.AutoConfig.for_model("wav2vec2", **TINY, vocab_size=len(names), pad_token_id=0)
    weights = transformers.AutoModelForCTC.from_config(config)
    weights.save_pretrained(tmp_path)
    given = overrides(root, "model={name: transformers/wav2vec2}", f"source.weights={tmp_path}")
    setting = prepare(load_spec(EXAMPLE, given))
    assert setting.domains.labels == tuple(names)
    assert setting.shared
    assert torch.equal(obtain_source(setting).model.network.lm_head.weight, weights.lm_head.weight)
    batch = setting.domains.shots.batch([0])
    (text,) = setting.task.texts([batch["labels"][0].tolist()])
    assert text in ("A CAB", "BAD", "A BEE", "DEED", "CAB")
    model = "model={name: transformers/wav2vec2, args: %s}"
    with pytest.raises(
        ctl.SpecError, match=r"args.num_attention_heads must be 2, as config.json .*; received 4. Leave"
    ):
        prepare(load_spec(EXAMPLE, [*given, model % "{num_attention_heads: 4}"]))
    with pytest.raises(ctl.SpecError, match=r"model.name must be 'transformers/wav2vec2', as config.json"):
        prepare(load_spec(EXAMPLE, [*given, "model={name: transformers/hubert}"]))
    left = prepare(load_spec(EXAMPLE, [*given, model % "{num_hidden_layers: 1, hidden_dropout: 0.3}"])).spec.model.args
    sizes = {name: left[name] for name in TINY if name in left}
    assert left == {**sizes, "output_hidden_size": 16, "num_hidden_layers": 1, "hidden_dropout": 0.3}
    assert {name: value for name, value in sizes.items() if value != TINY[name]} == {"num_hidden_layers": 1}
    rate = "data.features={kind: waveform, normalise: none, sample_rate: 8000}"
    with pytest.raises(ctl.SpecError, match=r"sample_rate must be 16000, as source.weights .* are resampled"):
        prepare(load_spec(EXAMPLE, [*given, rate]))


@pytest.mark.parametrize("by", ["the tokenizer", "source.labels"])
def test_a_head_whose_blank_is_not_the_first_output_is_read_in_order(root, tmp_path, by):
    """Rows are moved with their labels: outputs are those of the model beside, the blank first."""
    names = ["|", "[PAD]", *"ABCDE", "[UNK]"]
    order = [1, 0, 2, 3, 4, 5, 6, 7]
    config = transformers.AutoConfig.for_model("wav2vec2", **TINY, vocab_size=8, pad_token_id=1)
    weights = transformers.AutoModelForCTC.from_config(config).eval()
    weights.save_pretrained(tmp_path)
    given = overrides(root, "model={name: transformers/wav2vec2}", f"source.weights={tmp_path}")
    if by == "the tokenizer":
        (tmp_path / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
        special = {"bos_token": None, "eos_token": None, "unk_token": "[UNK]", "pad_token": "[PAD]"}
        transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), **special).save_pretrained(tmp_path)
    else:
        given.append(f"source.labels={json.dumps(['|', '<blank>', *names[2:]])}")
    setting = prepare(load_spec(EXAMPLE, given))
    assert setting.shared is (by == "the tokenizer")
    blank = "[PAD]" if setting.shared else "<blank>"
    assert setting.domains.source_labels == (blank, "|", *"ABCDE", "[UNK]")
    source = obtain_source(setting)
    wave = torch.randn(1, 900)
    with torch.no_grad():
        ours, _ = source.model(wave, torch.tensor([900]))
        torch.testing.assert_close(ours, weights(wave).logits[..., order], rtol=1e-4, atol=1e-5)
    plan = setting.adaptation(source.with_notes()).plan
    assert not [row.name for row in plan.rows if row.origin == "fresh"]


def test_the_characters_of_bundles_hold_the_space():
    assert bundle_labels("WAV2VEC2_ASR_BASE_960H").startswith(" ETAON")
    assert bundle_labels("wav2vec2_base") == ""
