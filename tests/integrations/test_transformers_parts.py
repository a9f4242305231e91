"""Parts of the Trainer's integration by themselves: optimizers, phases in schedulers, shares of a step, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import conservtl as ctl

transformers = pytest.importorskip("transformers")

from conservtl.integrations.transformers import ConservingTrainer, checks  # noqa: E402
from conservtl.integrations.transformers.accumulation import divides_by_items, share_of_step  # noqa: E402
from conservtl.integrations.transformers.optimizer import optimizer_class  # noqa: E402
from conservtl.integrations.transformers.phases import scale_scheduler  # noqa: E402
from conservtl.integrations.transformers.state import load_adaptation, save_adaptation  # noqa: E402


class WholeModel:
    """A builder of optimizers that is no optimizer."""


class EightBits(torch.optim.SGD):
    __module__ = "bitsandbytes.optim"


def trainer_with(cls, **options):
    args = SimpleNamespace(optim="own", weight_decay=0.1)
    return SimpleNamespace(args=args, optimizer_cls_and_kwargs=(cls, options))


@pytest.mark.parametrize(
    ("cls", "options", "why"),
    [
        (WholeModel, {}, "is built from the whole model"),
        (torch.optim.SGD, {"params": []}, "chooses parameters by itself"),
        (EightBits, {"optim_bits": 8}, "keeps the state of embeddings apart"),
    ],
)
def test_optimizers_without_groups_of_the_plan_are_refused(cls, options, why):
    with pytest.raises(ctl.SpecError, match=f"{cls.__name__} {why}"):
        optimizer_class(trainer_with(cls, **options))


@pytest.mark.parametrize(
    ("cls", "options"), [(torch.optim.SGD, {"lr": 1, "weight_decay": 0.1}), (torch.optim.Rprop, {"lr": 1})]
)
def test_the_weight_decay_of_the_arguments_goes_where_there_is_one(cls, options):
    assert optimizer_class(trainer_with(cls, lr=1)) == (cls, options)


def test_schedulers_in_a_scheduler_go_on_from_the_phases_rates():
    optimizer = SimpleNamespace(param_groups=[{"initial_lr": 0.1}, {"initial_lr": 0.2}])
    inner = SimpleNamespace(optimizer=optimizer, base_lrs=[1.0, 1.0])
    scale_scheduler(SimpleNamespace(optimizer=optimizer, _schedulers=[inner]))
    assert inner.base_lrs == [0.1, 0.2]


@pytest.mark.parametrize(
    ("inputs", "items", "share"),
    [
        ({}, 8, 1 / 4),
        ({"labels": torch.ones(2, 3)}, None, 1 / 4),
        ({"shift_labels": torch.tensor([1, -100, 2])}, 8, 2 / 8),
    ],
    ids=["no labels", "no count", "shifted labels"],
)
def test_the_share_of_a_batch(inputs, items, share):
    args = SimpleNamespace(average_tokens_across_devices=False)
    trainer = SimpleNamespace(compute_loss_func=None, loss_is_scaled_for_ga=True, args=args)
    trainer.current_gradient_accumulation_steps = 4
    assert float(share_of_step(trainer, inputs, items)) == share


@pytest.mark.parametrize(
    ("loss", "divides"), [(lambda items: 6 / items, True), (lambda _: 6.0, False), (lambda _: 0.0, None)]
)
def test_whether_a_model_divides_by_the_count(loss, divides):
    class Model(nn.Linear):
        def forward(self, x, num_items_in_batch):
            return {"loss": torch.tensor(loss(num_items_in_batch))}

    assert divides_by_items(Model(1, 1), {"x": 0}, 3) is divides


def test_one_process_writes_the_state(tmp_path):
    adaptation = ctl.adapt(nn.Linear(2, 2), nn.Linear(2, 2))
    save_adaptation(adaptation, tmp_path, write=False)
    assert not list(tmp_path.iterdir())
    save_adaptation(adaptation, tmp_path)
    load_adaptation(adaptation, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_deepspeed_enabled": True}, "deepspeed steps copies"),
        ({"is_fsdp_enabled": True}, "fsdp version 1 flattens"),
        ({"args": SimpleNamespace(n_gpu=2)}, "2 GPUs in one process"),
    ],
)
def test_trainers_that_lose_the_pull_are_refused(changes, message):
    adaptation = ctl.adapt(nn.Linear(2, 2), nn.Linear(2, 2))
    plugin = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    given = {"model_init": None, "model": adaptation.model, "optimizer": None, "accelerator": plugin}
    given |= {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "args": SimpleNamespace(n_gpu=1)}
    checks.check_trainer(SimpleNamespace(**given), adaptation)
    with pytest.raises(ctl.SpecError, match=message):
        checks.check_trainer(SimpleNamespace(**given | changes), adaptation)


def test_another_mixin_may_come_between_but_the_methods_must_be_there(monkeypatch):
    between = type("Between", (ConservingTrainer,), {})
    with pytest.raises(ctl.SpecError, match="Between is a mixin for a Trainer"):
        checks.check_class(between, ConservingTrainer, complete=True)
    monkeypatch.setattr(checks, "_PRIVATE", ("no_such_method",))
    with pytest.raises(ctl.SpecError, match="must clip gradients in no_such_method"):
        type("Own", (between, transformers.Trainer), {})
