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
