"""Sources without a head, as an encoder saved alone: runs say their drift in the place of the source's scores."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import conservtl as ctl
from conservtl.cli import app
from conservtl.experiments.run.runner import plan_of, run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import prepare_source
from conservtl.experiments.spec.spec import dump_spec, parse_spec

NO_LABELS = "the source's weights have no head, so the source has no labels of its own"


def body(fields, head):
    """Return the tensors of the spec's network without its head, at values of a seed."""
    model = prepare(parse_spec(fields)).model(3)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(head)}


@pytest.fixture
def speech(speech_fields, tmp_path):
    """A speech run with source data, from a body alone that was saved as a folder and under the name of a wrapper."""
    tensors = body(speech_fields, "head.")
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "tc"}))
    save_file({f"module.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return {**speech_fields, "source": {"weights": str(folder)}}


@pytest.fixture
def vision(image_folder, tmp_path):
    """A vision run on four images of each of three classes, without source data, from a trunk saved by torch."""
    fields = {
        "task": "vision",
        "data": {"kind": "imagefolder", "root": image_folder("abc"), "shots": 2, "images": {"size": 8},
                 "augment": False},
        "source": {"weights": str(tmp_path / "trunk.pt")},
        "strategies": [{"kind": "l2_sp"}],
        "training": {"epochs": 1},
    }  # fmt: skip
    (tmp_path / "trunk.pt").touch()
    torch.save({"state_dict": body(fields, "linear.")}, tmp_path / "trunk.pt")
    return fields


@pytest.mark.parametrize("task", ["speech", "vision"])
def test_run_by_the_command_line(task, request, tmp_path):
    fields = request.getfixturevalue(task)
    spec, out = tmp_path / "spec.yaml", tmp_path / "out"
    spec.write_text(dump_spec(parse_spec(fields)))
    result = CliRunner().invoke(app, ["run", str(spec), "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    drift = max(report["drift"].values())
    assert drift > 0
    said = f"the source has no labels of its own to measure, and its weights moved by at most {100 * drift:.2g} %"
    page, card = (out / "report.html").read_text().replace("&#39;", "'"), (out / "README.md").read_text()
    for text in (result.output, page, report["sentence"], card.replace("\\", "")):
        assert said in text
    for text in (result.output, page, report["left_out"][0], card.replace("\\", "")):
        assert f"source metrics, and agreement and KL divergence with the source model, because {NO_LABELS}" in text
    assert "answers as the source" not in result.output
    assert report["agreement"] is None
    assert report["before"]["source"] is report["after"]["source"] is None
    assert 0 <= report["before"]["target"]["accuracy"] <= 1
    assert set(report["transfer"]["fresh"].values()) == {"the source has no head"}
    assert ctl.load_adapted(out).labels == tuple(prepare(parse_spec(fields)).domains.labels)


def test_the_body_is_the_sources(speech):
    """And its head is no value of the source: two seeds of the run differ in it alone."""
    spec = parse_spec(speech)
    setting, source = prepare_source(spec)
    adaptation = setting.adaptation(source.with_notes())
    expected = body({**speech, "source": {}}, "head.")
    state = adaptation.model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor)
    assert not any(name.startswith("head") for name in adaptation.transfer.copied)
    assert "it has no head, so no labels of its own" in str(plan_of(spec))


def test_features_are_conserved_without_a_head(speech, tmp_path):
    report = run(
        parse_spec(
            {**speech, "strategies": [{"kind": "feature_conservation", "alpha": 0.1}], "training": {"epochs": 1}}
        ),
        tmp_path / "o",
    )
    assert report["left_out"]


def test_compare(speech, tmp_path):
    """With baselines, joint training on the source's data among them; the page and the console say what is missing."""
    pytest.importorskip("matplotlib")
    fields = speech | {"training": {"epochs": 1}, "compare": {"seeds": 1, "variants": {"l2": {}},
                                   "baselines": ["source as it is", "joint training"]}}  # fmt: skip
    spec, out = tmp_path / "spec.yaml", tmp_path / "out"
    spec.write_text(dump_spec(parse_spec(fields)))
    result = CliRunner().invoke(app, ["compare", str(spec), "--out", str(out)])
    assert result.exit_code == 0, result.output
    table = json.loads((out / "compare.json").read_text())
    assert [row["variant"] for row in table["tables"][0]["rows"]] == [
        "source as it is", "joint training", "l2"
    ]  # fmt: skip
    assert all(row["source"] is None for row in table["tables"][0]["rows"])
    page = (out / "report.html").read_text().replace("&#39;", "'")
    for text in (table["left_out"][0], result.output, page):
        assert f"source kept, harmonic mean and constrained score: {NO_LABELS}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategies": [{"kind": "output_conservation"}]}, r"OutputConservation compares outputs with the source's"),
        ({"strategies": [{"kind": "fisher_sp", "data": "source"}]}, r"FisherSP is measured on source data through"),
        ({"training": {"epochs": 1, "keep": "harmonic"}}, r"training\.keep=harmonic chooses by the source's"),
        ({"training": {"epochs": 1, "keep": "path"}}, r"training\.keep=path .*Set source\.data to null"),
    ],
)  # fmt: skip
def test_what_needs_answers_of_the_source_is_refused(speech, tmp_path, change, message):
    with pytest.raises(ctl.SourceError, match=message):
        run(parse_spec({**speech, **change}), tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


def test_labels_of_outputs_that_are_not_there(speech, tmp_path):
    speech["source"]["labels"] = ["0", "1", "2"]
    with pytest.raises(ctl.SourceError, match=r"source\.labels must name the outputs of .*which has no head"):
        run(parse_spec(speech), tmp_path / "out")


def test_recommend_is_refused(speech):
    with pytest.raises(ctl.SpecError, match=r"outputs are measured \(LEEP\), and source\.weights have no head"):
        ctl.recommend(parse_spec(speech))


def test_tune_by_the_target_alone(speech, tmp_path):
    pytest.importorskip("optuna")
    from conservtl.experiments.studies.tuning import tune

    fields = {**speech, "tune": {"trials": 1}, "training": {"epochs": 1, "lr": {"range": [1e-4, 1e-3]}}}
    fields["data"] = {**speech["data"], "validation": 0.5}
    with pytest.raises(ctl.SpecError, match=r"tune\.objective=harmonic needs the source's score.*no head"):
        tune(fields, tmp_path / "out")
    result = tune({**fields, "tune": {"trials": 1, "objective": "target"}}, tmp_path / "out")
    assert result["trials"][0]["state"] == "complete"


def test_a_body_that_lacks_more_than_the_head_is_refused(speech, tmp_path):
    """A head of two layers must be named whole."""
    state = body({**speech, "source": {}}, ("head.", "blocks.2."))
    save_file(state, tmp_path / "encoder" / "model.safetensors")
    with pytest.raises(ctl.SourceError, match=r"has no tensor 'blocks\.2\..*name the whole head in model\.head"):
        run(parse_spec(speech), tmp_path / "out")


def test_trunks_of_libraries(tmp_path, vision):
    """timm's trunk without classifier, and torchvision's model of which only the body was saved."""
    timm = pytest.importorskip("timm")
    from torchvision.models import shufflenet_v2_x0_5

    trunks = {
        "timm/resnet10t": timm.create_model("resnet10t", num_classes=0).state_dict(),
        "shufflenet_v2_x0_5": {n: t for n, t in shufflenet_v2_x0_5().state_dict().items() if not n.startswith("fc.")},
    }
    for name, state in trunks.items():
        torch.save(state, tmp_path / "trunk.pt")
        fields = {**vision, "model": {"name": name}, "data": {**vision["data"], "images": {"size": 32}}}
        drawn = plan_of(parse_spec(fields))
        assert {row.origin for row in drawn.rows if row.name not in drawn.fresh} == {"source"}
        assert {row.reason for row in drawn.rows if row.fresh} == {"the source has no head"}


def test_an_encoder_of_torchaudio(speech, tmp_path):
    """A wav2vec 2.0 base, saved alone, goes under the model's own prefix."""
    torchaudio = pytest.importorskip("torchaudio")
    sizes = {
        "extractor_mode": "group_norm", "extractor_conv_layer_config": [[8, 10, 5], [8, 3, 2], [8, 3, 2]],
        "extractor_conv_bias": False, "encoder_embed_dim": 8, "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 4, "encoder_pos_conv_groups": 2, "encoder_num_layers": 2, "encoder_num_heads": 2,
        "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 8, "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": None,
    }  # fmt: skip
    save_file(torchaudio.models.wav2vec2_model(**sizes).state_dict(), tmp_path / "encoder" / "model.safetensors")
    fields = {**speech, "model": {"name": "wav2vec2_model", "args": sizes}}
    fields["data"] = {**speech["data"], "features": {"kind": "waveform"}}
    drawn = plan_of(parse_spec(fields))
    assert drawn.fresh == ("head.weight", "head.bias")
    assert "source  put the names under 'backbone.'" in str(drawn)
