"""Wrong arguments give one sentence, not the traceback of another library."""

import pytest
import torch

import conservtl as ctl


@pytest.fixture
def adaptation():
    return ctl.adapt(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2))


DATA = (torch.randn(6, 4), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DATA, DATA), "valid must name its sets"),
        ((DATA, None, {"epochs": 6}), "training must be a Training"),
    ],
)
def test_fit_names_what_it_takes(adaptation, arguments, message):
    with pytest.raises(ctl.SpecError, match=message):
        ctl.fit(adaptation, *arguments)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda a: ctl.fit(a, DATA, seed=-1), "seed must be a whole number, 0 to 4294967295, or None; received -1."),
        (lambda a: ctl.fit(a, DATA, seed=1.5), "seed must be a whole number, 0 to 4294967295, or None; received 1.5."),
        (lambda a: ctl.fit(a, DATA, out=3), "out must be a path; received 3. Give a text or a pathlib.Path."),
        (
            lambda a: ctl.fit(a, DATA, accelerator="cpu"),
            "accelerator must be an accelerate.Accelerator, or None for a new one; received str.",
        ),
        (
            lambda a: a.optimizer(torch.optim.SGD, lr="fast"),
            "SGD: lr must be a finite number of at least 0; received 'fast'. Give one.",
        ),
        (
            lambda a: a.optimizer(torch.optim.SGD, lr=-1),
            "SGD: lr must be a finite number of at least 0; received -1. Give one.",
        ),
        (lambda a: a.start_phase("head"), "phase must be one of 0 to 0; received 'head'."),
        (lambda a: a.loss(0.5, None), "the loss must be a scalar, the mean over the batch; received float. Reduce it."),
        (
            lambda a: a.measure([DATA], on="test"),
            "on must be 'target' or 'source', the domain of the batches; received 'test'.",
        ),
    ],
)
def test_a_wrong_argument_of_the_loop(adaptation, call, said):
    with pytest.raises(ctl.SpecError) as refused:
        call(adaptation)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prefix": 3}, "prefix must be a text; received 3. Write what the wanted names begin with."),
        ({"rename": "a"}, "rename must be {expression: replacement}; received 'a'. Write a dictionary."),
        ({"labels": 3}, "labels must be two lists, (target, source); received 3. Give both."),
        ({"labels": (["a"], 3)}, "labels must be two lists, (target, source); received (['a'], 3). Give both."),
        ({"strategies": 3}, "strategies must be a list; received 3. Write [L2SP(alpha=0.1)]."),
    ],
)
def test_a_wrong_argument_of_adapt(wrong, said):
    with pytest.raises(ctl.SpecError) as refused:
        ctl.adapt(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), **wrong)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ctl.find_layers(3), "model must be a torch.nn.Module; received int."),
        (lambda: ctl.recompute_statistics({}, []), "model must be a torch.nn.Module; received dict."),
        (
            lambda: ctl.interpolate({}, {}, True),
            "t must be between 0 (the source) and 1 (the adapted model); received True.",
        ),
        (lambda: ctl.interpolation_path({}, {}, "3"), "points must be at least 2, for the two ends; received '3'."),
        (
            lambda: ctl.soup([{}, {}], score=3),
            "score must be a function of a state dict; received 3. Pass one, or leave it out.",
        ),
        (lambda: ctl.load_adapted(3), "folder must be a path; received 3. Give a text or a pathlib.Path."),
        (
            lambda: ctl.best_block(3, DATA, {"target": DATA}),
            "fit trains the result of adapt(model, source, ...); received int.",
        ),
    ],
)
def test_a_wrong_argument_of_a_function(call, said):
    with pytest.raises(ctl.SpecError) as refused:
        call()
    assert str(refused.value) == said


def test_save_takes_a_folder_and_labels(adaptation, tmp_path):
    with pytest.raises(ctl.SpecError, match=r"^folder must be a path; received 3\. Give a text or a pathlib\.Path\.$"):
        ctl.save(adaptation, 3, ["a", "b"])
    with pytest.raises(ctl.SpecError, match=r"^labels must be a list of texts, one for each output; received 3\.$"):
        ctl.save(adaptation, tmp_path / "out", 3)


def test_fit_wants_an_adaptation():
    with pytest.raises(ctl.SpecError, match="adapt"):
        ctl.fit(torch.nn.Linear(4, 2), DATA)


def test_an_optimizer_instance_is_refused(adaptation):
    made = torch.optim.SGD(adaptation.model.parameters())
    with pytest.raises(ctl.SpecError, match="pass the class"):
        adaptation.optimizer(made)


def test_a_strategy_without_its_list():
    with pytest.raises(ctl.SpecError, match="must be a list"):
        ctl.adapt(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), ctl.L2SP())


def test_weights_that_are_a_picture(tmp_path):
    picture = tmp_path / "weights.pt"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    with pytest.raises(ctl.SourceError, match="cannot be read as weights") as found:
        ctl.adapt(torch.nn.Linear(4, 2), picture)
    assert "weights_only" not in str(found.value)


def test_public_names_are_what_completion_shows():
    assert "load_adapted" in dir(ctl)
    assert "Any" not in dir(ctl)


@pytest.mark.parametrize(("old", "new"), [("load", "load_adapted"), ("path", "interpolation_path")])
def test_a_renamed_function_warns_and_works(old, new):
    with pytest.warns(DeprecationWarning, match=f"conservtl.{old} is now conservtl.{new}"):
        assert getattr(ctl, old) is getattr(ctl, new)
    assert new in ctl.__all__
    assert old not in [*ctl.__all__, *dir(ctl)]
