"""A plan in Lightning's Trainer: the steps of ``fit``, phases, checkpoints, and what is refused before training."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import conservtl as ctl

lightning = pytest.importorskip("lightning.pytorch")
from conservtl.integrations.lightning import Conserve  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
]

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
EVERYTHING = (
    ctl.L2SP(alpha=0.3, beta=0.1),
    ctl.DiscriminativeLR(decay=0.5),
    ctl.GradualUnfreezing(epochs=1),
    ctl.OutputConservation(),
    ctl.Mixout(p=0.3),
)


class Module(lightning.LightningModule):
    """A LightningModule as people write it, with an optimizer of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Served(Module):
    """A LightningModule with an adaptation, whose optimizer it returns."""

    def __init__(self, adaptation):
        super().__init__(adaptation.model)
        self.adaptation = adaptation

    def configure_optimizers(self):
        return self.adaptation.optimizer(SGD)


@pytest.fixture
def adapted(net):
    """Return a function that adapts a network by strategies."""
    return lambda *strategies: ctl.adapt(net(0), net(1), strategies)


@pytest.fixture
def trainer():
    """Return a function that makes a Trainer without files, logs and bars."""

    def make(*callbacks, **options):
        quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        return lightning.Trainer(
            **{"max_epochs": 3, "accelerator": "cpu", "callbacks": [*callbacks], **quiet, **options}
        )

    return make


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def close(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("own", [False, True], ids=["by the callback", "by configure_optimizers"])
def test_the_steps_of_fit(adapted, trainer, batches, own):
    """Accumulation, clipping, phases, rates, a pull, a term, a held norm and mixed weights; validated every epoch."""
    expected, found = adapted(*EVERYTHING), adapted(*EVERYTHING)
    training = ctl.Training(epochs=3, optimizer="sgd", lr=0.1, accumulate=2, clip=0.2, device="cpu")
    ctl.fit(expected, batches, training=training)
    module = Served(found) if own else Module(found.model)
    callback = Conserve() if own else Conserve(found, optimizer=SGD)
    trainer(callback, accumulate_grad_batches=2, gradient_clip_val=0.2).fit(module, batches, batches)
    close(weights(found.model), weights(expected.model))
    assert found.phase == 1
    assert callback.adaptation is found


@pytest.mark.parametrize("keep", ["train", "eval"])
def test_batch_norms_as_the_setting_says(adapted, trainer, batches, keep):
    expected, found = adapted(ctl.L2SP()), adapted(ctl.L2SP())
    training = ctl.Training(epochs=3, optimizer="sgd", lr=0.1, batch_norm=keep, device="cpu")
    ctl.fit(expected, batches, training=training)
    trainer(Conserve(found, optimizer=SGD, batch_norm=keep)).fit(Module(found.model), batches, batches)
    close(weights(found.model), weights(expected.model))
    start = found.start["stem.1.running_mean"]
    assert torch.equal(found.model.stem[1].running_mean, start) == (keep == "eval")


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_pull_is_clipped_with_the_gradients(adapted, trainer, batches, algorithm):
    """As a penalty in the loss would be, whichever way the Trainer clips."""
    expected, found = adapted(ctl.L2SP(alpha=5.0)), adapted(ctl.L2SP(alpha=5.0))
    clip = {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}[algorithm]
    optimizer = expected.optimizer(SGD, pull=False)
    for _ in range(3):
        for inputs, labels in batches:
            (F.cross_entropy(expected.model(inputs), labels) + expected.penalty()).backward()
            clip(expected.model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    trainer(Conserve(found, optimizer=SGD), **options).fit(Module(found.model), batches)
    close(weights(found.model), weights(expected.model))


def test_a_loss_scale_and_a_skipped_step(adapted, trainer, batches):
    """The pull joins unscaled gradients before clipping, also after a step that the scaler skipped."""
    plugins = pytest.importorskip("lightning.pytorch.plugins.precision")
    expected, found = adapted(ctl.L2SP(alpha=5.0)), adapted(ctl.L2SP(alpha=5.0))
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=2) for _ in range(2)]
    optimizer = expected.optimizer(SGD)
    for _ in range(3):
        for inputs, labels in batches:
            with torch.autocast("cpu", torch.half, cache_enabled=False):
                loss = F.cross_entropy(expected.model(inputs), labels) * 8
            scalers[0].scale(loss).backward()
            expected.pull(scalers[0])
            torch.nn.utils.clip_grad_norm_(expected.model.parameters(), 0.05)
            scalers[0].step(optimizer)
            scalers[0].update()
            optimizer.zero_grad()

    class Louder(Module):
        def training_step(self, batch, index):
            return 8 * super().training_step(batch, index)

    precision = plugins.MixedPrecision("16-mixed", "cpu", scalers[1])
    trainer(Conserve(found, optimizer=SGD), plugins=[precision], gradient_clip_val=0.05).fit(
        Louder(found.model), batches
    )
    assert scalers[1].get_scale() == scalers[0].get_scale() < 2.0**20  # some steps were skipped
    close(weights(found.model), weights(expected.model))


def test_terms_that_the_training_step_adds_are_not_added_twice(adapted, trainer, batches):
    expected, found = adapted(ctl.OutputConservation()), adapted(ctl.OutputConservation())

    class Explicit(Module):
        def training_step(self, batch, index):
            outputs = self.model(batch[0])
            return {"loss": found.loss(F.cross_entropy(outputs, batch[1]), outputs, batch[0]), "more": 1}

    trainer(Conserve(expected, optimizer=SGD)).fit(Module(expected.model), batches)
    trainer(Conserve(found, optimizer=SGD)).fit(Explicit(found.model), batches)
    close(weights(found.model), weights(expected.model))


def test_keyword_arguments_and_a_dictionary_reach_the_source_model(net, trainer, data):
    """The model is called with positional and keyword arguments; the step returns a dictionary."""

    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, inputs, scale=1.0, shift=0.0):
            return scale * self.inner(inputs) + shift

    class Keywords(Module):
        def training_step(self, batch, index):
            return {"loss": F.cross_entropy(self.model(batch["x"], scale=batch["scale"]), batch["y"])}

    expected, found = (ctl.adapt(Scaled(net(0)), Scaled(net(1)), [ctl.OutputConservation()]) for _ in range(2))
    optimizer = expected.optimizer(SGD)
    outputs = expected.model(data[0], scale=3.0)
    expected.loss(F.cross_entropy(outputs, data[1]), outputs, {"inputs": data[0], "scale": 3.0}).backward()
    optimizer.step()
    whole = DataLoader([{"x": data[0], "y": data[1], "scale": 3.0}], batch_size=None)
    trainer(Conserve(found, optimizer=SGD), max_epochs=1).fit(Keywords(found.model), whole)
    close(weights(found.model), weights(expected.model))


def test_an_adaptation_of_the_whole_module(net, trainer, batches):
    """Mixout acts although the step calls a part of the adapted model, which announces no pass."""

    def adapt(seed):
        return ctl.adapt(Module(net(0)), Module(net(1)), [ctl.Mixout(p=0.5, seed=seed)])

    found = []
    for seed in (0, 1):
        adaptation = adapt(seed)
        trainer(Conserve(adaptation, optimizer=SGD), max_epochs=1).fit(adaptation.model, batches)
        found.append(weights(adaptation.model))
    expected = ctl.adapt(net(0), net(1), [ctl.Mixout(p=0.5, seed=0)])
    ctl.fit(expected, batches, training=ctl.Training(epochs=1, optimizer="sgd", lr=0.1, device="cpu"))
    close({name.removeprefix("model."): tensor for name, tensor in found[0].items()}, weights(expected.model))
    assert not torch.equal(found[0]["model.head.weight"], found[1]["model.head.weight"])


def test_validation_and_checkpoints_see_plain_weights(adapted, trainer, batches, tmp_path):
    """Also within accumulated batches, and if the validation calls a part of the model."""
    adaptation = adapted(ctl.Mixout(p=0.5))
    plain = weights(adaptation.model)
    seen = []

    class Parts(Module):
        def validation_step(self, batch, index):
            self.model.head(self.model.body(self.model.stem(batch[0])))
            seen.append(weights(self.model))

    options = {"accumulate_grad_batches": 4, "val_check_interval": 1, "num_sanity_val_steps": 0, "max_epochs": 1}
    with torch.no_grad():
        adaptation.model.head.weight.add_(1.0)
        plain["head.weight"].add_(1.0)
    fitting = trainer(Conserve(adaptation, optimizer=SGD), limit_val_batches=1, **options)
    fitting.fit(Parts(adaptation.model), batches, batches)
    statistics = [name for name in plain if "running" in name or "tracked" in name]
    for found in seen[:3]:  # the fourth follows the step
        close(*({name: each[name] for name in each if name not in statistics} for each in (found, plain)), 0.0)
    assert len(seen) == 4


def test_an_evaluation_before_training_leaves_anchors_that_have_gradients(adapted, trainer, batches):
    """Lightning evaluates in inference mode; tensors made there cannot be saved for a backward pass."""
    adaptation = adapted(ctl.L2SP(alpha=1.0), ctl.Mixout(p=0.5))
    adaptation.optimizer(SGD)
    with torch.inference_mode():
        adaptation.model.eval()(batches.dataset.tensors[0])
    assert all(not tensor.is_inference() for tensor in adaptation.start.values())
    adaptation.model.train()(batches.dataset.tensors[0]).sum().backward()
    adaptation.restore_weights()
    adaptation.penalty().backward()


class Resumable:
    """Batches in an order of their own each epoch, that go on where a checkpoint was written."""

    def __init__(self, data):
        self.data, self.epoch, self.next = data, 0, 0

    def __len__(self):
        return 4

    def __iter__(self):
        if self.next == 4:
            self.epoch, self.next = self.epoch + 1, 0
        order = torch.randperm(32, generator=torch.Generator().manual_seed(self.epoch)).split(8)
        while self.next < 4:
            index = order[self.next]
            self.next += 1
            yield self.data[0][index], self.data[1][index]

    def state_dict(self):
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state):
        self.epoch, self.next = state["epoch"], state["next"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_goes_on_from_a_checkpoint_within_an_epoch(adapted, trainer, data, tmp_path):
    """Anchors, phase, rates, momentum, masks and the annealing's step: the weights of an uninterrupted run."""
    strategies = (
        ctl.L2SP(alpha=0.3, anneal=ctl.Anneal(steps=10)),
        ctl.GradualUnfreezing(epochs=1, scales=(1.0, 0.5)),
        ctl.Mixout(p=0.3),
        ctl.DiscriminativeLR(decay=0.5),
    )

    def fit(adaptation, folder, path=None):
        saving = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
        fitting = trainer(Conserve(adaptation, optimizer=SGD), saving, enable_checkpointing=True, max_epochs=2)
        fitting.fit(Module(adaptation.model), Resumable(data), ckpt_path=path)

    whole = adapted(*strategies)
    fit(whole, tmp_path)
    for step in (2, 4, 6, 7):
        rest = adapted(*strategies)
        with torch.no_grad():
            for parameter in rest.model.parameters():
                parameter.add_(1.0)  # the checkpoint brings all values
        fit(rest, tmp_path, next(tmp_path.glob(f"*step={step}.ckpt")))
        close(weights(rest.model), weights(whole.model))
        assert rest.bound.updates.number == 8


class Rates(lightning.loggers.logger.DummyLogger):
    """Logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append(dict(metrics))


def test_the_monitor_shows_layers_by_name_and_rates_by_phase(adapted, trainer, batches):
    adaptation = adapted(ctl.DiscriminativeLR(decay=0.5), ctl.GradualUnfreezing(epochs=1, scales=(1.0, 0.5)))
    logger = Rates()
    callback = Conserve(
        adaptation,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        scheduler=partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.5, total_iters=8),
        interval="step",
    )
    monitor = lightning.callbacks.LearningRateMonitor("step")
    options = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 2}
    trainer(callback, monitor, **options).fit(Module(adaptation.model), batches, batches)
    lines = [line for line in logger.lines if "lr-SGD/head" in line]
    assert {name for line in lines for name in line} == {"lr-SGD/stem", "lr-SGD/body", "lr-SGD/head"}
    factors = [1 - step / 16 for step in range(8)]
    scale = [1.0] * 4 + [0.5] * 4
    for place, name in enumerate(["head", "body", "stem"]):
        expected = [0.1 * 0.5**place * factor * phase for factor, phase in zip(factors, scale, strict=True)]
        torch.testing.assert_close([line[f"lr-SGD/{name}"] for line in lines], expected)


def test_a_held_norm_is_no_cause_for_a_warning_and_stays_held(adapted, trainer, batches):
    """The Trainer warns of modules in eval mode; it restores modes after each validation."""
    adaptation = adapted(ctl.LayerTransfer(layers=["stem"]))
    start = adaptation.model.stem[1].running_mean.clone()
    trainer(Conserve(adaptation, optimizer=SGD), val_check_interval=2).fit(Module(adaptation.model), batches, batches)
    assert torch.equal(adaptation.model.stem[1].running_mean, start)


def test_the_module_is_left_as_it_was(adapted, trainer, batches):
    """After training and after an error in it."""
    adaptation = adapted(ctl.OutputConservation())
    module = Module(adaptation.model)
    before = {name: value for name, value in vars(module).items() if callable(value)}
    trainer(Conserve(adaptation, optimizer=SGD), max_epochs=1).fit(module, batches)
    assert {name: value for name, value in vars(module).items() if callable(value)} == before
    wrong = DataLoader([(torch.randn(4, 5), torch.zeros(4))], batch_size=None)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trainer(Conserve(adaptation, optimizer=SGD), max_epochs=1).fit(module, wrong)
    assert {name: value for name, value in vars(module).items() if callable(value)} == before
    assert not module.model._forward_hooks


def test_a_function_of_the_module_adapts_it(net, trainer, batches):
    callback = Conserve(lambda module: ctl.adapt(module.model, net(1), [ctl.L2SP()]), optimizer=SGD)
    module = Module(net(0))
    with pytest.raises(ctl.SpecError, match=r"when trainer.fit\(module\) begins"):
        _ = callback.adaptation
    trainer(callback, max_epochs=1).fit(module, batches)
    assert callback.adaptation.model is module.model
    assert 0 < callback.adaptation.drift()["head"] < 1


def test_two_adaptations_in_one_trainer(net, trainer, data, tmp_path):
    """Manual optimization with an optimizer each; each has a state of its own in the checkpoint."""

    class Two(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.one, self.two = net(0), net(1)
            self.adapted = [ctl.adapt(model, net(2), [ctl.L2SP(alpha=1.0)]) for model in (self.one, self.two)]

        def training_step(self, batch, index):
            for model, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
                self.manual_backward(F.cross_entropy(model(batch[0]), batch[1]))
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [each.optimizer(SGD) for each in self.adapted]

    module = Two()
    expected = [ctl.adapt(model, net(2), [ctl.L2SP(alpha=1.0)]) for model in (net(0), net(1))]
    for each in expected:
        optimizer = each.optimizer(SGD)
        for _ in range(2):
            F.cross_entropy(each.model(data[0]), data[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
    callbacks = [Conserve(each, name=name) for each, name in zip(module.adapted, "ab", strict=True)]
    fitting = trainer(*callbacks, max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    fitting.fit(module, DataLoader([data], batch_size=None))
    close(weights(module.one), weights(expected[0].model))
    close(weights(module.two), weights(expected[1].model))
    fitting.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert sum(key.startswith("Conserve") for key in saved) == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_two_processes_make_the_steps_of_one(adapted, trainer, data, tmp_path):
    """DDP, with a layer that a phase frees after the model is wrapped; each process has half of every batch."""

    class Parted(Served):
        def train_dataloader(self):
            world, rank = self.trainer.world_size, self.trainer.global_rank
            sampler = DistributedSampler(TensorDataset(*data), world, rank, shuffle=False)
            return DataLoader(sampler.dataset, 8 // world, sampler=sampler)

        def on_train_end(self):
            torch.save(self.model.state_dict(), tmp_path / f"{self.trainer.world_size}{self.global_rank}.pt")

    held = ctl.LayerTransfer(layers=["stem"])  # its norm would see other batches
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2, "use_distributed_sampler": False}
    for devices in (1, 2):
        module = Parted(adapted(held, *EVERYTHING))
        strategy = "auto" if devices == 1 else "ddp_fork"
        trainer(Conserve(), devices=devices, strategy=strategy, **options).fit(module)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("10", "20", "21"))
    close(first, one)
    close(second, first, 0.0)


def test_the_trainer_of_the_other_package_takes_the_callback():
    """Reference: the same steps by lightning's Trainer."""
    other = pytest.importorskip("pytorch_lightning")
    inputs, labels = torch.randn(24, 4), torch.arange(24) % 2
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    start, source = nn.Linear(4, 2), nn.Linear(4, 2)

    def trained(package):
        class OfPackage(package.LightningModule):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def training_step(self, batch, index):
                return F.cross_entropy(self.model(batch[0]), batch[1])

            def configure_optimizers(self):
                return None

        model = nn.Linear(4, 2)
        model.load_state_dict(start.state_dict())
        adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=0.3)])
        callback = Conserve(adaptation, optimizer=SGD)
        assert isinstance(callback, package.Callback)
        trainer = package.Trainer(max_epochs=2, callbacks=[callback], accelerator="cpu", barebones=True)
        trainer.fit(OfPackage(model), loader)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(trained(other), trained(lightning))
