"""Recipes: one name in a spec stands for strategies, training and augmentation, and what is said beside it wins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import conservtl as ctl
from conservtl.experiments.run.runner import run
from conservtl.experiments.spec.recipes import RECIPES
from conservtl.experiments.spec.spec import dump_spec, load_spec, parse_spec, schema

EXAMPLES = Path(__file__).parents[3] / "examples"
DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def fields_of(name):
    file = {"recognizer": "speech/digit_strings.yaml", "vision": "vision/recipe.yaml"}.get(name, "speech/recipe.yaml")
    return yaml.safe_load((EXAMPLES / file).read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_a_spec_with_a_recipe_is_the_spec_with_it_written_out(name, tmp_path):
    spec, found = parse_spec(fields_of(name)), ctl.recipe(name)
    assert spec.strategies == found.strategies
    said = fields_of(name).get("training", {})
    assert spec.training == found.training.model_copy(update=said)
    (tmp_path / "spec.yaml").write_text(dump_spec(spec))
    assert load_spec(tmp_path / "spec.yaml") == spec


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_spec_says_itself_wins(name):
    fields = fields_of(name)
    fields["training"] = {"lr": 1e-5}
    fields["data"]["augment"] = False if name == "vision" else None
    spec = parse_spec(fields)
    assert (spec.training.lr, spec.training.epochs) == (1e-5, ctl.recipe(name).training.epochs)
    assert spec.data.augment == fields["data"]["augment"]
    assert fields["strategies"] == {"recipe": name}, "what was handed in is not changed"


def test_the_speakers_recordings_are_changed_as_the_recipe_says():
    spec = parse_spec(fields_of("speaker"))
    assert spec.data.augment.time_stretch == ctl.recipe("speaker").augment["time_stretch"] > 0


def test_an_utterance_changes_in_speed_as_the_recipe_says_and_is_masked_as_usual():
    spec = parse_spec(fields_of("recognizer"))
    assert spec.data.augment == type(spec.data.augment)(speed=0.1)
    assert spec.strategies == (ctl.OutputConservation(weight=1.0, temperature=1.0), ctl.WeightInterpolation(t=0.85))
    with pytest.raises(ctl.SpecError, match=r"'speaker' is for speech, and the task is transcribe. Use recognizer"):
        parse_spec({**fields_of("recognizer"), "strategies": {"recipe": "speaker"}})


def test_the_recognizer_compares_on_other_voices():
    chosen = ctl.recipe("recognizer").proxies
    spec = parse_spec(fields_of("recognizer"))
    assert spec.data.proxies == type(spec.data.augment)(**chosen)
    fields = fields_of("recognizer")
    fields["data"]["proxies"] = {"tilt": 0.2}
    assert parse_spec(fields).data.proxies == type(spec.data.augment)(**{**chosen, "tilt": 0.2})
    fields["data"]["proxies"] = None
    assert parse_spec(fields).data.proxies is None
    said = str(ctl.recipe("recognizer"))
    assert "others = changed copies  " in said


def test_an_override_reaches_into_what_the_recipe_sets():
    root = ["data.root=x", "data.target=y"]
    spec = load_spec(EXAMPLES / "speech" / "recipe.yaml", [*root, "training.epochs=3", "data.augment.noise=0"])
    assert spec.training.epochs == 3
    assert (spec.data.augment.noise, spec.data.augment.tilt) == (0, ctl.recipe("speaker").augment["tilt"])


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ({"recipe": "cooking"}, "recipe must be one of speaker, recognizer, vision; received 'cooking'"),
        ({"recipe": "vision"}, "'vision' is for vision, and the task is speech. Use speaker"),
        ({"recipe": "speaker", "alpha": 1}, "a recipe by name alone.*alpha.*spec.yaml"),
        ({}, "a recipe by name alone"),
    ],
)
def test_what_is_no_recipe_for_this_is_refused(strategies, message):
    with pytest.raises(ctl.SpecError, match=message):
        parse_spec({**fields_of("speaker"), "strategies": strategies})


def test_editors_know_of_both():
    found = json.loads(schema())["$defs"]["VisionSpec"]["properties"]["strategies"]
    listed, named = found["anyOf"]
    assert listed["type"] == "array"
    assert named["properties"]["recipe"]["enum"] == list(RECIPES)
    assert "description" in found


def test_it_runs_and_the_folder_says_what_was_done(speech_fields, tmp_path):
    short = {**speech_fields, "strategies": {"recipe": "speaker"}, "training": {"epochs": 2}}
    report = run(parse_spec(short), tmp_path / "out")
    kinds = [one["kind"] for one in report["spec"]["strategies"]]
    assert kinds == [one.kind for one in ctl.recipe("speaker").strategies]
    assert load_spec(tmp_path / "out" / "spec.yaml").strategies == ctl.recipe("speaker").strategies


def test_a_network_without_batch_norms_goes_without_their_part(speech_fields, tmp_path):
    group = {**speech_fields, "model": {"args": {"norm": "group"}}, "strategies": {"recipe": "speaker"}}
    report = run(parse_spec({**group, "training": {"epochs": 1}}), tmp_path / "out")
    assert not report["plan"]["extensions"]
    assert [term["by"] for term in report["plan"]["terms"]] == ["FeatureConservation"]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs CIFAR-10 images and the published ResNet-20 beside the checkout")
def test_the_norms_of_the_recipe_see_more_of_low_contrast_before_anything_is_trained(tmp_path):
    """On the real network, with 80 images of each class: many more right, and of the clean ones hardly fewer."""
    for folder in (DATA / "cifar10").glob("*/*"):
        (made := tmp_path / "images" / folder.parent.name / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:40]:
            shutil.copy(image, made)
    given = [f"data.root={tmp_path / 'images'}", f"source.weights={DATA / 'weights' / 'resnet20-12fca82f.th'}"]
    spec = load_spec(
        EXAMPLES / "vision" / "recipe.yaml", [*given, "data.corruption.name=contrast", "training.threads=1"]
    )
    norms = ctl.recipe("vision").strategies[0].model_copy(update={"train": "nothing"})
    report = run(spec.model_copy(update={"strategies": (norms,)}), tmp_path / "out")
    before, after = ({d: report[when][d]["accuracy"] for d in ("target", "source")} for when in ("before", "after"))
    assert after["target"] > before["target"] + 0.15
    assert after["source"] > before["source"] - 0.02


class TestInALoop:
    """A recipe handed to ``adapt`` as it is."""

    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    y = torch.arange(32) % 3

    def adapted(self, recipe, classes=3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, classes))
        source = {**model.state_dict(), "1.running_var": torch.full((6,), 2.0)}
        return ctl.adapt(model, source, recipe)

    def recipe(self, **training):
        settings = ctl.Training(
            epochs=6, batch_size=32, lr=0.05, schedule="cosine", warmup=0.2, device="cpu", **training
        )
        return ctl.Recipe(
            task="vision",
            strategies=(ctl.DiscriminativeLR(decay=0.5), ctl.L2SP(alpha=0.1), ctl.WeightInterpolation(t=0.75)),
            training=settings,
        )

    @pytest.mark.parametrize("batch_norm", ["train", "eval"])
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    def test_the_printed_loop_is_what_fit_does(self, batch_norm, optimizer):
        recipe = self.recipe(batch_norm=batch_norm, optimizer=optimizer)
        fitted, own = self.adapted(recipe), self.adapted(recipe)
        ctl.fit(fitted, (self.x, self.y))
        optimizer = own.optimizer()
        scheduler = own.scheduler(steps=6)
        for _ in range(own.training.epochs):
            own.model.train()
            outputs = own.model(self.x)
            own.loss(nn.functional.cross_entropy(outputs, self.y), outputs, self.x).backward()
            optimizer.step(), scheduler.step(), optimizer.zero_grad()
        own.finish([self.x])
        for name, tensor in own.model.state_dict().items():
            torch.testing.assert_close(tensor, fitted.model.state_dict()[name], rtol=1e-4, atol=1e-5)
        held = torch.equal(own.model[1].running_var, own.start["1.running_var"])
        assert held == (batch_norm == "eval")

    def test_settings_given_to_fit_win(self):
        """And those of the recipe hold again after it."""
        adaptation = self.adapted(self.recipe(batch_norm="eval"))
        ctl.fit(adaptation, (self.x, self.y), training=ctl.Training(epochs=1, device="cpu"))
        assert not torch.equal(adaptation.model[1].running_var, adaptation.start["1.running_var"])
        assert not adaptation.model.train()[1].training
        assert adaptation.optimizer(lr=0.3).param_groups[-1]["lr"] == 0.3

    @pytest.mark.parametrize("name", RECIPES)
    def test_it_says_what_must_be_called(self, name):
        text = str(ctl.recipe(name))
        compared = "outputs, inputs" if ctl.recipe(name).proxies is None else "model(others), others"
        for call in ("ctl.adapt(model, source, recipe)", "adaptation.optimizer()", "adaptation.scheduler(steps=steps)",
                     f"adaptation.loss(loss, {compared})", "adaptation.finish(batches)"):  # fmt: skip
            assert call in text
        assert f"for each of {ctl.recipe(name).training.epochs} epochs" in text
        assert "batch norms keep their statistics" in text
        assert "lr=0.00" in text

    def test_without_settings_a_class_is_asked_for(self):
        adaptation = self.adapted(self.recipe().strategies)
        assert adaptation.training is None
        with pytest.raises(ctl.SpecError, match=r"without training settings.*optimizer\(torch\.optim\.AdamW"):
            adaptation.optimizer()
        adaptation.optimizer(torch.optim.SGD, lr=0.1)
        with pytest.raises(ctl.SpecError, match=r"without training settings.*scheduler\(torch"):
            adaptation.scheduler(steps=3)
        adaptation = self.adapted(self.recipe())
        adaptation.optimizer()
        for options in ({}, {"steps": 0}, {"steps": 2.5}, {"steps": 3, "T_max": 3}):
            with pytest.raises(ctl.SpecError, match="needs the number of optimizer steps"):
                adaptation.scheduler(**options)
