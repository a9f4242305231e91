"""What Lightning's Trainer and a plan cannot do together is refused before the first step, in one sentence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import conservtl as ctl

lightning = pytest.importorskip("lightning.pytorch")
from conservtl.integrations.lightning import Conserve  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")

SGD = partial(torch.optim.SGD, lr=0.1)


class Module(lightning.LightningModule):
    """A LightningModule that counts its steps."""

    def __init__(self, model, configure=None, passes=1):
        super().__init__()
        self.model, self.backbone = model, torch.nn.Linear(4, 4)
        self.configure, self.passes, self.steps = configure, passes, 0

    def training_step(self, batch, index):
        self.steps += 1
        return sum(F.cross_entropy(self.model(batch[0]), batch[1]) for _ in range(self.passes))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters()) if self.configure is None else self.configure()


@pytest.fixture
def refused(net, batches):
    """Return a function that fits and returns the message of the refusal, raised before a step was made."""

    def message(callback, module, *others, **options):
        defaults = {"max_epochs": 3, "accelerator": "cpu", "barebones": True}
        trainer = lightning.Trainer(callbacks=[callback, *others], **{**defaults, **options})
        with pytest.raises(ctl.SpecError) as raised:
            trainer.fit(module, batches)
        assert module.steps in (0, 1)
        assert "configure_optimizers" not in vars(module)
        return str(raised.value)

    return message


@pytest.fixture
def adapted(net):
    return lambda *strategies: ctl.adapt(net(0), net(1), strategies)


def test_an_optimizer_of_the_users(adapted, refused):
    adaptation = adapted(ctl.L2SP())
    message = refused(Conserve(adaptation), Module(adaptation.model))
    assert "the optimizer must be the adaptation's" in message
    assert "Module.configure_optimizers made another (AdamW)" in message
    adaptation.optimizer(SGD)
    assert "made another (AdamW)" in refused(Conserve(adaptation), Module(adaptation.model))


def test_a_finetuning_callback_of_lightning(adapted, refused):
    adaptation = adapted(ctl.L2SP())
    other = lightning.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=2)
    message = refused(Conserve(adaptation, optimizer=SGD), Module(adaptation.model), other)
    assert "BackboneFinetuning does so too" in message
    assert "GradualUnfreezing(epochs=2)" in message
    assert all(parameter.requires_grad for parameter in adaptation.model.parameters())


def test_a_finetuning_callback_that_comes_first(adapted, refused):
    """It has frozen its layers by then; they are left as the plan says."""
    adaptation = adapted()
    other = lightning.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    assert "Leave it out" in refused(other, Module(adaptation.model), Conserve(adaptation, optimizer=SGD))


def test_a_copy_of_the_model(adapted, net, refused):
    message = refused(Conserve(adapted(), optimizer=SGD), Module(net(0)))
    assert "Module must contain the model that was adapted, a Net" in message


@pytest.mark.parametrize("given", [None, 3, lambda module: module.model])
def test_no_adaptation(net, refused, given):
    message = refused(Conserve(given, optimizer=SGD), Module(net(0)))
    assert message.startswith("Conserve takes the result of adapt(model, source, ...)")
    missing = "Module has no such attribute. Set it before fit begins."
    assert message.endswith(missing if given is None else "received int." if given == 3 else "Net.")


def test_an_adaptation_under_another_name(adapted, refused):
    module = Module((adaptation := adapted()).model)
    module.adaption = adaptation
    assert refused(Conserve(optimizer=SGD), module).endswith("Its self.adaption is one: rename it.")


@pytest.mark.parametrize(
    ("epochs", "options", "expected"),
    [
        (5, {"max_epochs": 3}, "Trainer(max_epochs=...) is 3, but the plan's phases (head, all) take at least 6"),
        (0.5, {"max_epochs": -1, "max_steps": 3}, "a phase lasts a share of the run"),
    ],
)
def test_phases_that_do_not_fit(adapted, refused, epochs, options, expected):
    adaptation = adapted(ctl.GradualUnfreezing(epochs=epochs))
    assert expected in refused(Conserve(adaptation, optimizer=SGD), Module(adaptation.model), **options)


def test_a_scheduler_that_would_undo_a_phase(adapted, refused):
    adaptation = adapted(ctl.GradualUnfreezing(epochs=1, scales=(1.0, 0.5)))

    def configure():
        optimizer = adaptation.optimizer(SGD)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    message = refused(Conserve(adaptation), Module(adaptation.model, configure))
    assert "a StepLR keeps those of the first phase" in message
    assert "adaptation.scheduler(StepLR, ...)" in message


def test_averaging_that_would_make_all_rates_equal(adapted, refused, batches):
    averaging = lightning.callbacks.StochasticWeightAveraging
    adaptation = adapted(ctl.DiscriminativeLR(decay=0.5))
    message = refused(Conserve(adaptation, optimizer=SGD), Module(adaptation.model), averaging(swa_lrs=0.05))
    assert "a rate for each of the 3 groups (stem, body, head)" in message
    rates = averaging(swa_lrs=[0.01, 0.02, 0.04], swa_epoch_start=1, annealing_epochs=1)
    callbacks = [Conserve(adaptation, optimizer=SGD), rates]
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", barebones=True, callbacks=callbacks)
    trainer.fit(Module(adaptation.model), batches)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.02, 0.04]


def test_terms_on_two_passes(adapted, refused):
    """Known at the first step only."""
    adaptation = adapted(ctl.OutputConservation())
    message = refused(Conserve(adaptation, optimizer=SGD), Module(adaptation.model, passes=2))
    assert "training_step made 2 of Net" in message


def test_a_measurement_that_was_not_made(adapted, refused):
    adaptation = adapted(ctl.FisherSP())
    assert "adaptation.measure" in refused(Conserve(adaptation, optimizer=SGD), Module(adaptation.model))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_norm": "frozen"}, "batch_norm must be 'train' or 'eval'; received 'frozen'"),
        ({"optimizer": SGD, "interval": "batch"}, "interval must be 'epoch' or 'step'; received 'batch'"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR}, "Pass optimizer=..."),
    ],
)
def test_arguments(adapted, options, expected):
    with pytest.raises(ctl.SpecError, match=expected):
        Conserve(adapted(), **options)


def test_a_checkpoint_of_another_plan(adapted, refused, batches, tmp_path):
    first, second = adapted(ctl.L2SP(alpha=0.1)), adapted(ctl.L2SP(alpha=0.2))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Conserve(first, optimizer=SGD)],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
    )
    trainer.fit(Module(first.model), batches)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    other = lightning.Trainer(
        max_epochs=2, accelerator="cpu", barebones=True, callbacks=[Conserve(second, optimizer=SGD)]
    )
    with pytest.raises(ctl.PlanError, match="another plan"):
        other.fit(Module(second.model), batches, ckpt_path=tmp_path / "first.ckpt")
