"""A run's card holds the run's numbers and nothing of the machine it ran on."""

import json

import pytest

import conservtl as ctl
from conservtl.experiments.publishing.card import check_card
from conservtl.experiments.publishing.licence import front_matter
from conservtl.experiments.run.runner import run
from conservtl.experiments.spec.spec import parse_spec
from conservtl.storage.tensor_files import read_header


def test_a_run_writes_its_card(speech_fields, humming, tmp_path):
    report = run(parse_spec(speech_fields), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    data = front_matter(tmp_path / "out/README.md")
    assert (data["license"], data["pipeline_tag"]) == ("unknown", "audio-classification")
    after = {one["dataset"]["type"]: one["metrics"][0]["value"] for one in data["model-index"][0]["results"]}
    assert after == {domain: report["after"][domain]["accuracy"] for domain in ("target", "source")}
    assert "unknown: check the source's." in text
    assert "`L2SP`" in text
    for private in (str(humming), str(tmp_path)):
        assert private not in text
        assert private not in json.dumps(read_header(tmp_path / "out/model.safetensors"))


def test_a_readme_that_no_run_wrote_is_kept(speech_fields, tmp_path):
    (tmp_path / "README.md").write_text("# Notes of my own\n")
    with pytest.raises(ctl.SpecError, match=r"README\.md' is no card that a run wrote.*another folder"):
        run(parse_spec(speech_fields), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "README.md").write_text("---\ntags: [conservtl]\n---\n# An earlier run\n")
    check_card(tmp_path)
