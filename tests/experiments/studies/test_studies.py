"""Compare, sweep and tune: kept run by run, the same splits for all, nothing done twice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.run.evaluation_sets import score_on_tests
from conservtl.experiments.run.runner import run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.sections import BASELINES
from conservtl.experiments.spec.spec import load_spec, parse_spec, with_fields
from conservtl.experiments.studies import result_store
from conservtl.experiments.studies import trial as module
from conservtl.experiments.studies.comparison import compare, plan_trials, summarise
from conservtl.experiments.studies.layer_sweep import sweep
from conservtl.experiments.studies.result_store import ResultStore
from conservtl.experiments.studies.trial import Trial, run_trial
from conservtl.experiments.studies.tuning import tune
from conservtl.experiments.studies.variants import left_out
from conservtl.report.text.summary import study_notes


@pytest.fixture
def fields(speech_fields):
    return {
        **speech_fields,
        "data": {**speech_fields["data"], "shots": 2},
        "compare": {"targets": ["cleo", "anna"], "seeds": 1, "baselines": ["source as it is", "fine-tuning, low rate"]},
    }


def after_epoch(spec, epoch):
    """Accuracies of a run's weights after so many epochs."""

    class EnoughError(Exception):
        pass

    setting = prepare(spec)
    source = obtain_source(setting)
    adaptation = setting.adaptation(source.model)
    found = {}

    def tell(line):
        if line["epoch"] == epoch:
            scores = score_on_tests(setting, source, adaptation.model)
            found.update({name: scores[name].metrics["accuracy"] for name in scores})
            raise EnoughError

    valid = {"target": setting.domains.validation, "source": setting.domains.source_train}
    with pytest.raises(EnoughError):
        setting.fit(adaptation, setting.domains.shots, valid, tell=tell)
    return found


class TestTrial:
    def test_it_is_the_run_that_run_makes(self, speech_fields, tmp_path):
        spec = parse_spec(speech_fields)
        report = run(spec, tmp_path / "out")
        found = run_trial(Trial("own", "cleo", spec))
        for when in ("before", "after"):
            for domain in ("target", "source"):
                assert found[when][domain] == pytest.approx(report[when][domain]["accuracy"])

    def test_from_scratch_nothing_comes_from_the_source(self, speech_fields):
        setting = prepare(parse_spec({**speech_fields, "strategies": []}))
        source = obtain_source(setting)
        scratch, adapted = (module._adaptation(how, setting, source) for how in ("scratch", "adapt"))
        assert not scratch.transfer.copied
        assert set(scratch.plan.fresh) == {row.name for row in scratch.plan.rows}
        assert not adapted.plan.fresh
        theirs = source.model.state_dict()
        assert not torch.equal(scratch.model.state_dict()["head.weight"], theirs["head.weight"])

    def test_joint_training_sees_each_domain_as_often(self, speech_fields):
        setting = prepare(parse_spec(speech_fields))
        domains = setting.domains
        both = module._training_data("joint", setting)
        times = len(domains.source_train) // len(domains.shots)
        assert len(both) == len(both.labels) == len(domains.source_train) + times * len(domains.shots)
        assert module._training_data("adapt", setting) is domains.shots
        assert run_trial(Trial("x", "cleo", setting.spec, "joint"))["steps"] > 0

    def test_joint_training_needs_the_labels_that_the_source_s_examples_have(self, speech_fields):
        """Those of a source model's further outputs, which no example has, do not matter."""
        setting = prepare(parse_spec(speech_fields))
        domains, labels = setting.domains, setting.domains.labels
        other = replace(domains, source_labels=(*domains.source_labels, "more"))
        both = module._training_data("joint", replace(setting, domains=other, shared=False))
        assert torch.equal(both.labels, module._training_data("joint", setting).labels)
        other = replace(domains, source_labels=("more", *labels[1:]))
        with pytest.raises(ctl.SpecError, match="joint training needs source data with the target's labels"):
            module._training_data("joint", replace(setting, domains=other, shared=False))

    @pytest.mark.parametrize(
        ("layout", "classes", "shares"),
        [
            ("", ("cat", "dog"), True),
            ("", ("cat", "dog", "eel"), True),
            ("train", ("cat", "dog"), True),
            ("", ("cat", "eel", "fox"), False),
            ("train", ("cat", "fox"), False),
        ],
    )
    def test_joint_training_is_run_where_the_source_s_classes_are_the_target_s_by_name(
        self, layout, classes, shares, tmp_path
    ):
        for folder, names in (("target", ("cat", "dog", "eel")), ("source", classes)):
            for name in names:
                for part in [layout, "test"] if layout and folder == "source" else [""]:
                    (tmp_path / folder / part / name).mkdir(parents=True)
        fields = {
            "task": "vision",
            "data": {"kind": "imagefolder", "root": tmp_path / "target", "source_root": tmp_path / "source"},
        }
        labels = [trial.variant for trial in plan_trials(parse_spec(fields))]
        assert ("joint training" in labels) is shares
        named = parse_spec({**fields, "compare": {"baselines": ["joint training"]}})
        if shares:
            assert left_out(named, named.compare) == {}
            return
        with pytest.raises(ctl.SpecError, match=r"and the source has labels that the target lacks\. Give some"):
            plan_trials(named)

    def test_its_key_names_all_it_depends_on(self, speech_fields):
        spec = parse_spec(speech_fields)
        others = [
            Trial("own", "cleo", with_fields(spec, {"seed": 1})),
            Trial("own", "cleo", with_fields(spec, {"training.lr": 1e-4})),
            Trial("own", "cleo", spec, "scratch"),
            Trial("own", "cleo", spec, path=True),
        ]
        keys = {trial.key for trial in [Trial("own", "cleo", spec), *others]}
        assert len(keys) == 5
        assert (
            Trial("another name", "cleo", with_fields(spec, {"compare": {"seeds": 2}})).key
            == Trial("own", "cleo", spec).key
        )

    def test_trials_share_data_and_source_only_if_the_model_is_the_same(self, speech_fields):
        """A wider network is another source model, and its trial trains it."""
        spec = parse_spec({**speech_fields, "strategies": []})
        wide = with_fields(spec, {"model.args": {"width": 2.0}})
        assert Trial("a", "cleo", spec).place != Trial("a", "cleo", wide).place
        assert Trial("a", "cleo", spec).place == Trial("a", "cleo", with_fields(spec, {"training.lr": 1.0})).place
        trained = [run_trial(Trial("a", "cleo", one))["trained"] for one in (spec, wide)]
        assert trained[1] > 1.5 * trained[0]


class TestCompare:
    def test_every_variant_meets_every_target_on_the_same_splits(self, fields):
        fields["compare"] |= {"shots": [1, 2], "seeds": 2, "variants": {"weak": {"strategies.0.alpha": 1}}}
        trials = plan_trials(parse_spec(fields))
        assert len(trials) == 2 * 2 * 2 * 3
        assert {t.variant for t in trials} == {"source as it is", "fine-tuning, low rate", "weak"}
        assert {(t.target, t.spec.seed, t.spec.data.shots) for t in trials if t.variant == "weak"} == {
            (t.target, t.spec.seed, t.spec.data.shots) for t in trials
        }

    def test_all_speakers_where_none_is_named(self, fields):
        del fields["compare"]["targets"]
        spec = parse_spec(fields)
        assert spec.problem.targets(spec.data) == ("anna", "ben", "cleo")
        assert {trial.target for trial in plan_trials(spec)} == {"anna", "ben", "cleo"}

    def test_an_interrupted_comparison_goes_on(self, fields, tmp_path, monkeypatch):
        spec = parse_spec(fields)
        done = []

        def counted(trial):
            done.append(trial.key)
            if len(done) == 3:
                raise KeyboardInterrupt
            return run_trial(trial)

        monkeypatch.setattr(result_store, "run_trial", counted)
        with pytest.raises(KeyboardInterrupt):
            compare(spec, tmp_path)
        assert len(list((tmp_path / "runs").glob("*.json"))) == 2
        result = compare(spec, tmp_path)
        assert len(done) == 3 + 4
        assert len(set(done)) == 6
        assert compare(spec, tmp_path) == result
        assert len(done) == 7

    def test_rows_and_verdict(self, fields, tmp_path):
        result = compare(parse_spec(fields), tmp_path)
        (table,) = result["tables"]
        names = [row["variant"] for row in table["rows"]]
        assert names == ["source as it is", "fine-tuning, low rate", "L2SP"]
        own = table["rows"][-1]
        assert own["difference"]["count"] == 2
        assert not own["wins"]
        assert "too few to tell" in result["verdict"][0]
        assert set(own["per_target"]) == {"cleo", "anna"}
        assert json.loads(json.dumps(result))

    def test_early_stopping_only_where_shots_can_be_parted(self, fields):
        fields["compare"]["shots"] = [1, 2]
        low = [t for t in plan_trials(parse_spec(fields)) if t.variant == "fine-tuning, low rate"]
        assert {(t.spec.data.shots, t.spec.training.patience, t.spec.data.validation > 0) for t in low} == {
            (1, None, False),
            (2, 5, True),
        }

    @pytest.mark.parametrize(
        ("spec", "selection"),
        [
            ({}, ("target", 0.2)),
            ({"data.validation": 0.5, "training.keep": "target"}, ("target", 0.5)),
            ({"data.validation": 0.5, "training.keep": "harmonic"}, ("harmonic", 0.5)),
            ({"data.validation": 0.5, "training.keep": "path"}, ("harmonic", 0.5)),
        ],
    )
    def test_a_baseline_that_stops_early_selects_by_the_rule_of_the_variants(self, fields, spec, selection):
        own = with_fields(parse_spec(fields), spec)
        (low, _) = [t for t in plan_trials(own) if t.variant == "fine-tuning, low rate"]
        assert (low.spec.training.keep, low.spec.data.validation) == selection

    def test_a_baseline_that_stops_early_keeps_its_best_weights(self, fields):
        """Its result is that of the epoch with the best validation score; the last epoch's is another."""
        fields["data"] |= {"shots": 4}
        fields["training"] = {"epochs": 12, "lr": 1e-3}
        fields["compare"] |= {"targets": ["cleo"], "rates": [0.05, 0.3, 0.4]}
        (low,) = [t for t in plan_trials(parse_spec(fields)) if t.variant == "fine-tuning, low rate"]
        lines = []
        result = run_trial(low, judge=True, tell=lines.append)
        scores = [(line["valid"]["target"]["accuracy"], -line["valid"]["target"]["loss"]) for line in lines]
        best = max(range(len(scores)), key=lambda epoch: scores[epoch])
        assert result["after"] == after_epoch(low.spec, best + 1)
        assert result["after"] != after_epoch(low.spec, len(lines)), "the case must end worse than its best epoch"

    def test_a_variant_of_a_baselines_name_is_refused(self, fields):
        fields["compare"]["variants"] = {"from scratch": {}}
        with pytest.raises(ctl.SpecError, match="names of baselines"):
            plan_trials(parse_spec(fields))

    def test_a_field_that_is_none_is_refused(self, fields):
        fields["compare"]["variants"] = {"x": {"strategies.3.alpha": 1}}
        with pytest.raises(ctl.SpecError, match=r"strategies\.3\.alpha: there is no field '3'"):
            plan_trials(parse_spec(fields))

    def test_the_choice_of_examples_makes_no_other_source(self, fields):
        """A source model for each target and seed; baselines that stop early take a validation part beside."""
        fields["compare"] |= {"seeds": 2, "baselines": ["fine-tuning, low rate", "linear probe"], "shots": [2, 3]}
        trials = plan_trials(parse_spec(fields))
        assert len({trial.place for trial in trials}) == 2 * 2 * 2 * 2
        assert len({result_store._source_of(trial) for trial in trials}) == 2 * 2
        assert all(trial.trains_source for trial in trials)

    def test_dry_run_counts_and_keeps_nothing(self, fields, tmp_path):
        found = compare(parse_spec(fields), tmp_path / "out", dry_run=True)
        assert found["runs"] == 6
        assert found["seconds"] > 0
        assert not (tmp_path / "out").exists()

    def test_over_processes_it_is_the_same(self, fields, tmp_path):
        fields["compare"]["targets"] = ["cleo"]
        spec = parse_spec(fields)
        one, two = compare(spec, tmp_path / "one"), compare(spec, tmp_path / "two", processes=2)
        for a, b in zip(one["runs"], two["runs"], strict=True):
            assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


class TestSummary:
    """From runs that are made up: what wins, and what is said where nothing does."""

    def runs(self, gains, source=0.9):
        found = []
        for seed, gain in enumerate(gains):
            for name, target in (("fine-tuning, low rate", 0.8), ("mine", 0.8 + gain)):
                after = {"target": target, "source": source}
                before = {"target": 0.5, "source": source}
                found.append(
                    {
                        "variant": name,
                        "target": f"speaker {seed % 2}",
                        "shots": 5,
                        "seed": seed,
                        "before": before,
                        "after": after,
                        "seconds": 1.0,
                    }
                )
        return found

    def test_a_winner(self, fields):
        result = summarise(parse_spec(fields), self.runs([0.04, 0.05, 0.06, 0.05, 0.04, 0.06]))
        assert "mine beats the best baseline, fine-tuning, low rate" in result["verdict"][0]
        assert result["tables"][0]["rows"][1]["wins"]

    def test_no_winner_is_said_plainly(self, fields):
        result = summarise(parse_spec(fields), self.runs([0.04, -0.05, 0.03, -0.03, 0.04, -0.03]))
        assert "nothing beats the best baseline" in result["verdict"][0]

    @pytest.mark.parametrize(("seeds", "pairs"), [(5, 1), (6, 2)])
    def test_runs_that_a_seed_does_not_change_count_once(self, fields, seeds, pairs):
        """One run for each of the seeds, and one pair: no interval, and no winner by repeating it."""
        runs = self.runs([0.04] * seeds)
        for made in runs:
            last = made["seed"] == 5
            made |= {"target": "cleo", "steps": 3, "weights": {"0": 0.1 + last + 1e-6 * made["seed"]}}
            made["after"] = made["after"] | {"target": made["after"]["target"] + 0.02 * last}
        result = summarise(parse_spec(fields), runs)
        rows = result["tables"][0]["rows"]
        assert [row["target"]["count"] for row in rows] == [pairs, pairs]
        assert rows[1]["difference"]["count"] == pairs
        assert not rows[1]["wins"]
        score = [100 * 2 * target * 0.9 / (target + 0.9) for target in (0.84, 0.8)]
        few = f"{pairs} paired run{'s are' if pairs > 1 else ' is'} too few to tell: mine is nearest"
        assert few in result["verdict"][0]
        if pairs == 1:
            assert f"{few}, {score[0] - score[1]:+.1f} points in the harmonic mean" in result["verdict"][0]
        assert result["repeated"] == (["fine-tuning, low rate", "mine"] if pairs == 1 else [])
        notes = study_notes(result)
        assert [note[:63] for note in notes] == ["The seeds changed nothing for fine-tuning, low rate and mine: r"][
            : len(result["repeated"])
        ]

    def test_methods_that_score_alike_are_named_together(self, fields):
        runs = self.runs([0.04, 0.05])
        result = summarise(parse_spec(fields), [*runs, *({**run, "variant": "other"} for run in runs[1::2])])
        assert "2 paired runs are too few to tell: mine and other are nearest, +2." in result["verdict"][0]

    def test_without_source_data_the_target_decides_and_it_is_said(self, fields):
        result = summarise(parse_spec(fields), self.runs([0.04, 0.05, 0.06, 0.05, 0.04, 0.06], source=None))
        row = result["tables"][0]["rows"][1]
        assert row["harmonic"] is row["source"] is row["constrained"] is None
        assert "target accuracy" in result["verdict"][0]
        assert "no data" in result["left_out"][0]

    def test_joint_training_is_no_baseline_to_beat(self, fields):
        runs = self.runs([0.05] * 6)
        runs += [{**run, "variant": "joint training", "after": {"target": 1.0, "source": 1.0}} for run in runs[::2]]
        assert summarise(parse_spec(fields), runs)["tables"][0]["best_baseline"] == "fine-tuning, low rate"

    def test_every_baseline_has_a_maker(self, fields):
        fields["compare"]["baselines"] = list(BASELINES)
        assert {t.variant for t in plan_trials(parse_spec(fields))} == {*BASELINES, "L2SP"}


class TestSweep:
    def test_both_sides_all_forms_and_the_strength(self, fields, tmp_path):
        fields |= {"sweep": {"targets": ["cleo"], "seeds": 1, "layers": [0, 2, 5], "strengths": [1.0, 10.0]}}
        result = sweep(parse_spec(fields), tmp_path)
        assert [(c["side"], c["form"]) for c in result["curves"]] == [
            (side, form) for side in ("input", "output") for form in ("AnB", "AnB+", "BnB", "BnB+")
        ]
        assert all([p["n"] for p in curve["points"]] == [0, 2, 5] for curve in result["curves"])
        held = next(c for c in result["curves"] if c["form"] == "AnB")
        assert held["points"][-1]["target"]["mean"] == pytest.approx(result["before"]["target"]["mean"])
        assert [point["strength"] for point in result["strengths"]] == [1.0, 10.0]
        assert [point["t"] for point in result["path"]][::10] == [0.0, 1.0]
        assert result["path"][0]["target"]["mean"] == pytest.approx(result["before"]["target"]["mean"])

    def test_what_is_the_same_is_run_once(self, fields, tmp_path):
        fields |= {"sweep": {"targets": ["cleo"], "seeds": 1, "layers": [0], "strengths": [1.0]}}
        sweep(parse_spec(fields), tmp_path)
        assert len(list((tmp_path / "runs").glob("*.json"))) == 3

    def test_more_layers_than_there_are(self, fields, tmp_path):
        fields |= {"sweep": {"targets": ["cleo"], "layers": [99]}}
        with pytest.raises(ctl.SpecError, match=r"99 is more than the model has \(5\)"):
            sweep(parse_spec(fields), tmp_path)


class TestTune:
    @pytest.fixture
    def marked(self, fields):
        fields["training"] = {"epochs": 2, "lr": {"range": [1e-5, 1e-3], "log": True}}
        fields["data"]["validation"] = 0.5
        return fields | {"tune": {"trials": 3}}

    def test_the_best_trial_comes_out_as_a_spec(self, marked, tmp_path):
        result = tune(marked, tmp_path)
        assert [trial["state"] for trial in result["trials"]] == ["complete"] * 3
        scores = [trial["values"][0] for trial in result["trials"]]
        assert result["trials"][result["best"][0]]["values"][0] == max(scores)
        spec = load_spec(tmp_path / "best.yaml")
        assert spec.training.lr == result["trials"][result["best"][0]]["params"]["training.lr"]

    def test_of_equal_trials_one_is_the_best(self, marked, tmp_path):
        """A validation part of a few examples knows few scores."""
        marked["training"] = {"epochs": 2, "lr": {"choices": [1e-3]}}
        result = tune(marked, tmp_path)
        assert len({trial["values"][0] for trial in result["trials"]}) == 1
        assert len(result["best"]) == 1
        assert (tmp_path / "best.yaml").is_file()

    def test_processes_share_a_study(self, marked, tmp_path):
        """A second one with the same spec adds its trials; a third with another range is refused."""
        url = f"sqlite:///{tmp_path}/shared.db"
        marked["tune"] = {"trials": 2, "storage": url}
        tune(marked, tmp_path / "one")
        assert len(tune(marked, tmp_path / "two")["trials"]) == 4
        marked["training"] = {"epochs": 2, "lr": {"range": [1e-5, 1e-2], "log": True}}
        with pytest.raises(ctl.SpecError, match="of another spec"):
            tune(marked, tmp_path / "three")

    def test_both_domains_make_a_front(self, marked, tmp_path):
        marked["tune"] = {"trials": 3, "objective": "both"}
        result = tune(marked, tmp_path)
        assert all(len(trial["values"]) == 2 for trial in result["trials"])
        best = [result["trials"][number]["values"] for number in result["best"]]
        assert not any(a[0] > b[0] and a[1] > b[1] for a in best for b in best)

    def test_it_never_looks_at_a_test_part(self, marked, tmp_path, monkeypatch):
        """What is selected on is the validation part: spoiled test labels change no value."""
        marked["training"] = {"epochs": 2, "lr": {"choices": [1e-3]}}
        marked["tune"] = {"trials": 1}
        clean = tune(marked, tmp_path / "clean")
        whole = module.prepare_source

        def spoiled(spec):
            setting, source = whole(spec)
            setting.domains.target_test.labels.zero_()
            setting.domains.source_test.labels.zero_()
            return setting, source

        monkeypatch.setattr(module, "prepare_source", spoiled)
        module._shared.cache_clear()
        found = tune(marked, tmp_path / "spoiled")
        module._shared.cache_clear()
        assert found["trials"][0]["values"] == clean["trials"][0]["values"]

    def test_without_a_validation_part(self, marked, tmp_path):
        marked["data"]["validation"] = 0.0
        with pytest.raises(ctl.SpecError, match="judged on a part of the shots"):
            tune(marked, tmp_path)


def test_training_from_scratch_starts_from_the_seed(speech_fields):
    """Whatever was drawn before in this process: a study goes on in another one, after other runs."""

    def start(seed):
        setting = prepare(parse_spec({**speech_fields, "seed": seed}))
        return setting.scratch().model.state_dict()

    first, _, again, other = start(0), torch.rand(3), start(0), start(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ctl.SpecError, match="is a file"):
        ResultStore(tmp_path / "x")
