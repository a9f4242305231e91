"""An optimizer class that settings name runs only if its package was imported by hand."""

import functools

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.plugins import import_modules

DATA = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module with optimizers; imported as --import does."""
    (tmp_path / "own_steps.py").write_text(
        "import torch\n"
        "class Heavy(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, momentum=0.0):\n"
        "        super().__init__(params, lr, momentum=momentum)\n"
        "class Greedy(torch.optim.LBFGS):\n"
        "    pass\n"
    )
    monkeypatch.setattr("conservtl.plugins._IMPORTED", {})
    monkeypatch.syspath_prepend(tmp_path)
    return "own_steps"


def trained(training, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    adaptation = ctl.adapt(model, nn.Linear(4, 2), [ctl.L2SP(alpha=0.1)])
    ctl.fit(adaptation, DATA, training=training, seed=0, **options)
    return model.weight.detach()


def test_it_trains_as_the_class_that_is_handed_over(module):
    import_modules([module])
    import own_steps

    named = ctl.Training(optimizer={"import": "own_steps:Heavy", "args": {"momentum": 0.9}}, lr=0.1, device="cpu")
    plain = ctl.Training(lr=0.1, device="cpu")
    reference = trained(plain, optimizer=functools.partial(own_steps.Heavy, momentum=0.9))
    assert torch.equal(trained(named), reference)
    assert ctl.Training.model_validate(named.model_dump(mode="json")) == named
    assert named.model_dump(mode="json")["optimizer"] == {"import": "own_steps:Heavy", "args": {"momentum": 0.9}}


def test_nothing_is_imported_unless_the_user_did(module):
    with pytest.raises(ctl.SpecError, match=r"training.optimizer 'own_steps:Heavy' names code.*--import own_steps"):
        trained(ctl.Training(optimizer={"import": "own_steps:Heavy"}, device="cpu"))


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        ({"import": "own_steps:Havey"}, ctl.SpecError, r"has no function 'Havey'\. Did you mean 'Heavy'"),
        ({"import": "own_steps:Greedy"}, ctl.SpecError, "steps with a closure only"),
        ({"import": "own_steps:Heavy", "args": {"lr": 1}}, ctl.SpecError, r"lr is training\.lr"),
    ],
)
def test_a_class_that_fit_cannot_use_is_refused(module, optimizer, error, message):
    import_modules([module])
    with pytest.raises(error, match=message):
        trained(ctl.Training(optimizer=optimizer, device="cpu"))


@pytest.mark.parametrize("optimizer", ["rmsprop", 3, {"import": "no colon"}, {"import": "a:b", "arg": {}}, {}])
def test_what_names_no_optimizer_is_refused(optimizer):
    with pytest.raises(
        ValueError, match=r"Input should be 'adamw', 'adam' or 'sgd', or \{import: package.module:Class"
    ):
        ctl.Training(optimizer=optimizer)


def test_weight_decay_that_the_class_does_not_take_is_refused(module):
    import_modules([module])
    with pytest.raises(ctl.SpecError, match=r"Heavy takes no weight_decay"):
        trained(ctl.Training(optimizer={"import": "own_steps:Heavy"}, weight_decay=0.1, device="cpu"))


def test_settings_name_trackers(tmp_path):
    pytest.importorskip("tensorboard")
    training = ctl.Training(epochs=1, device="cpu", log=["tensorboard"])
    trained(training, out=tmp_path)
    assert list(tmp_path.rglob("events.out.*"))
    with pytest.raises(ctl.SpecError, match="tensorboard writes files, so it needs a folder"):
        trained(training)
    with pytest.raises(ctl.SpecError, match="Did you mean 'tensorboard'"):
        trained(ctl.Training(log=["tensorbord"], device="cpu"), out=tmp_path)
