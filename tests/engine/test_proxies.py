"""Proxies: terms that compare with the source see changed copies of the inputs, the task's loss the batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.runtime.preserve import preserve_statistics

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
ONE = ctl.Training(device="cpu", epochs=1, batch_size=12, optimizer="sgd", lr=0.1)


def net(seed, *, norm=False):
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(5) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(4, 5), middle, nn.Linear(5, 3)).double()


def moved(*strategies, norm=False):
    """Return an adaptation that is away from its source, where the divergence has a gradient."""
    adaptation = ctl.adapt(net(1, norm=norm), net(0, norm=norm), list(strategies), example=X)
    with torch.no_grad():
        for parameter in adaptation.model.parameters():
            parameter.add_(torch.linspace(-0.3, 0.4, parameter.numel()).view_as(parameter))
    return adaptation


def farther(batch, generator):
    """Other inputs, and more of them than the batch has."""
    x, y = batch
    return torch.cat([3 * x, x + torch.rand(len(x), 1, generator=generator, dtype=x.dtype)]), torch.cat([y, y])


def doubled(batch, generator):
    return 2 * batch[0], batch[1]


def divergence(model, source, x):
    return F.kl_div(model(x).log_softmax(1), source(x).log_softmax(1).detach(), log_target=True, reduction="batchmean")


def close(model, other):
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-12)


def close_after(trained, model, loss):
    """Hold a trained model against a step of plain descent by hand."""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.sub_(0.1 * gradient)
    close(trained, model)


KL = ctl.OutputConservation(weight=1.5, temperature=1.0)


class TestAStep:
    def test_the_task_on_the_batch_and_the_divergence_on_the_proxies(self):
        """The mean over both: loss(batch) + lambda KL(proxies), of which there are twice as many."""
        adaptation, seen = moved(KL), []
        model, source = copy.deepcopy(adaptation.model), net(0)

        def noted(batch, generator):
            seen.append(farther(batch, generator)[0])
            return seen[-1], torch.cat([batch[1]] * 2)

        ctl.fit(adaptation, (X, Y), training=ONE, proxies=noted, seed=0)
        loss = F.cross_entropy(model(X), Y) + 1.5 * divergence(model, source, seen[0])
        close_after(adaptation.model, model, loss)

    @pytest.mark.parametrize("labels", [None, -100])
    def test_a_share_of_the_tasks_loss_and_a_term_on_the_batch(self, labels):
        """With rho the task keeps 1 - rho; singular values are the batch's; labels of -100 count nowhere."""
        adaptation = moved(ctl.OutputConservation(rho=0.25), ctl.SpectralShrinkage(eta=0.01))
        model, source = copy.deepcopy(adaptation.model), net(0)
        y = Y.clone()
        if labels is not None:
            y[:4] = labels
        ctl.fit(adaptation, (X, y), training=ONE, proxies=doubled, seed=0)
        kept = y != -100
        p = source(2 * X[kept]).softmax(1).detach()
        loss = 0.75 * F.cross_entropy(model(X), y)
        loss = loss + 0.25 * -(p * model(2 * X[kept]).log_softmax(1)).sum(1).mean()
        loss = loss + 0.01 * torch.linalg.svdvals(model[:2](X))[-1] ** 2
        close_after(adaptation.model, model, loss)

    def test_features(self):
        adaptation = moved(ctl.FeatureConservation(alpha=0.7, layers=("0",)))
        model, source = copy.deepcopy(adaptation.model), net(0)
        ctl.fit(adaptation, (X, Y), training=ONE, proxies=doubled, seed=0)
        gap = model[0](2 * X) - source[0](2 * X).detach()
        close_after(adaptation.model, model, F.cross_entropy(model(X), Y) + 0.7 * gap.square().sum(1).mean() / 2)

    @pytest.mark.parametrize("strategy", [KL, ctl.FeatureConservation(alpha=0.7, layers=("0",))])
    def test_a_loop_of_ones_own_makes_the_same(self, strategy):
        adaptation = moved(strategy)
        other = copy.deepcopy(adaptation)
        ctl.fit(adaptation, (X, Y), training=ONE, proxies=doubled, seed=0)
        loss = F.cross_entropy(other.model(X), Y)
        others = 2 * X
        step = other.optimizer(torch.optim.SGD, lr=0.1)
        other.loss(loss, other.model(others), others).backward()
        step.step()
        close(adaptation.model, other.model)

    @pytest.mark.parametrize("size", [3, 4])
    def test_accumulation_equals_one_large_batch(self, size):
        small, large = moved(KL), moved(KL)
        settings = {"batch_size": size, "accumulate": -(-12 // size)}
        ctl.fit(small, (X, Y), training=ONE.model_copy(update=settings), proxies=doubled, seed=0)
        ctl.fit(large, (X, Y), training=ONE, proxies=doubled, seed=0)
        close(small.model, large.model)

    def test_proxies_as_the_batch_change_nothing(self):
        with_proxies, without = moved(KL), moved(KL)
        ctl.fit(with_proxies, (X, Y), training=ONE, proxies=lambda batch, _: batch, seed=0)
        ctl.fit(without, (X, Y), training=ONE, seed=0)
        close(with_proxies.model, without.model)


def test_norms_learn_statistics_of_the_batch_alone():
    """While the pass on the proxies is normalised as any in training is, by its own."""
    adaptation = moved(KL, norm=True)
    model, source = copy.deepcopy(adaptation.model), net(0, norm=True).eval()
    ctl.fit(adaptation, (X, Y), training=ONE, proxies=doubled, seed=0)
    reference = copy.deepcopy(model)
    reference.train()(X)
    model.train()
    close_after(adaptation.model, model, F.cross_entropy(model(X), Y) + 1.5 * divergence(model, source, 2 * X))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(adaptation.model[1], name), getattr(reference[1], name))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_statistics_stay_the_same_tensors(kind):
    norm = kind(2, track_running_stats=True)
    before, tensor = norm.running_mean.clone(), norm.running_mean
    inputs = torch.randn(3, 2, 4, requires_grad=True)
    first = norm(inputs)
    learned = norm.running_mean.clone()
    with preserve_statistics(norm):
        second = norm(5 + inputs)
    (first.square().sum() + second.square().sum()).backward()
    assert norm.running_mean is tensor
    assert torch.equal(tensor, learned)
    assert not torch.equal(tensor, before)


class TestDraws:
    def test_of_batches_and_augmentation_are_those_without_proxies(self):
        def augmented(proxies):
            seen = []

            def augment(batch, generator):
                seen.append((batch[1], torch.rand(3, generator=generator, dtype=torch.float64)))
                return batch

            training = ONE.model_copy(update={"batch_size": 4})
            ctl.fit(moved(KL), (X, Y), training=training, augment=augment, proxies=proxies, seed=5)
            return seen

        drawn = []

        def noted(batch, generator):
            drawn.append(torch.rand(3, generator=generator, dtype=torch.float64))
            return farther(batch, generator)

        first, second = augmented(None), augmented(noted)
        assert all(
            torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
        )
        assert not any(torch.equal(one, other) for one in drawn for _, other in second)

    def test_what_writes_into_the_batch_changes_a_copy(self):
        def writing(batch, _):
            batch[0].mul_(2)
            return batch

        one, other = moved(KL), moved(KL)
        data = X.clone(), Y
        ctl.fit(one, [data], training=ONE, proxies=writing, seed=0)
        ctl.fit(other, [data], training=ONE, proxies=doubled, seed=0)
        close(one.model, other.model)
        assert torch.equal(data[0], X)


class TestResuming:
    TRAINING = ONE.model_copy(update={"epochs": 3, "batch_size": 4})

    def run(self, out, **options):
        adaptation = moved(KL)
        augment = options.pop("augment", lambda batch, g: (batch[0] + torch.rand(1, generator=g), batch[1]))
        ctl.fit(adaptation, (X, Y), training=self.TRAINING, augment=augment, out=out, seed=1, **options)
        return adaptation

    def test_equals_an_uninterrupted_run(self, tmp_path):
        whole = self.run(tmp_path / "a", proxies=farther)

        def stop(line):
            if line["epoch"] == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "b", proxies=farther, tell=stop)
        resumed = self.run(tmp_path / "b", proxies=farther, resume=True)
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_with_others_is_refused(self, tmp_path):
        self.run(tmp_path, proxies=farther)
        with pytest.raises(
            ctl.SpecError, match=r"resume: the checkpoint was made with proxies, but now there are none"
        ):
            self.run(tmp_path, resume=True)

    def test_of_a_checkpoint_from_before_there_were_any(self, tmp_path):
        self.run(tmp_path)
        path = tmp_path / "checkpoint.pt"
        saved = torch.load(path, weights_only=True)
        del saved["proxies"], saved["adaptation"]["plan"]["proxies"]
        torch.save(saved, path)
        self.run(tmp_path, resume=True)


class TestThePlan:
    def test_says_it(self):
        adaptation = moved(KL, ctl.SpectralShrinkage(eta=0.01))
        ctl.fit(adaptation, (X, Y), training=ONE, proxies=doubled)
        lines = [line for line in str(adaptation.plan).splitlines() if line.startswith("loss")]
        assert [line.endswith(", on changed copies of the inputs") for line in lines] == [True, False]
        assert type(adaptation.plan)(**adaptation.plan.model_dump(mode="json")).proxies
        ctl.fit(adaptation, (X, Y), training=ONE)
        assert "copies of the inputs" not in str(adaptation.plan)


class TestRefused:
    @pytest.mark.parametrize("strategy", [ctl.L2SP(), ctl.SpectralShrinkage(eta=0.01), ctl.WeightInterpolation(t=0.5)])
    def test_without_a_term_that_compares(self, strategy):
        with pytest.raises(ctl.SpecError, match=r"proxies are inputs on which .* no strategy here does\. Add Output"):
            ctl.fit(moved(strategy), (X, Y), training=ONE, proxies=doubled)
        with pytest.raises(ctl.SpecError, match=r"no strategy here does"):
            ctl.lr_find(moved(strategy), (X, Y), ONE, proxies=doubled)

    def test_no_function(self):
        with pytest.raises(ctl.SpecError, match=r"proxies must be a function .* received 3"):
            ctl.fit(moved(KL), (X, Y), training=ONE, proxies=3)

    def test_a_function_that_returns_nothing(self):
        with pytest.raises(ctl.SpecError, match=r"proxies must return a batch.*received NoneType"):
            ctl.fit(moved(KL), (X, Y), training=ONE, proxies=lambda _, __: None)


def test_the_range_test_takes_them():
    seen = []

    def noted(batch, generator):
        seen.append(0)
        return farther(batch, generator)

    ctl.lr_find(moved(KL), (X, Y), ONE, proxies=noted, steps=10)
    assert 3 <= len(seen) <= 10


class Frames(nn.Module):
    """A network of sequences (N, T, 3) that is told their lengths."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(3, 4).double()

    def forward(self, inputs, lengths):
        return self.head(inputs)


@pytest.mark.parametrize("frames", [4, 6, 9])
def test_padding_and_labels_are_those_of_the_proxies(frames):
    """Labels of -100 leave positions of the batch out, and of proxies only where these have labels of their own."""
    batch = {
        "inputs": torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
        "lengths": torch.tensor([6, 4]),
        "labels": torch.tensor([[0, 1, 2, 3, 0, -100], [1, -100, 2, 3, -100, -100]]),
    }
    others = torch.randn(2, frames, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    lengths = torch.tensor([frames, 3])

    def longer(batch, generator):
        return {**batch, "inputs": others, "lengths": lengths}

    def loss(outputs, batch):
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())

    model, source = Frames(1), Frames(2)
    adaptation = ctl.adapt(copy.deepcopy(model), source, [KL], example=(batch["inputs"], batch["lengths"]))
    reference = adaptation.model.state_dict()
    model.load_state_dict(reference)
    with torch.no_grad():
        for one in (adaptation.model, model):
            one.head.weight.add_(torch.linspace(-0.5, 0.5, 12, dtype=torch.float64).view(4, 3))
    ctl.fit(adaptation, [batch], training=ONE, loss=loss, proxies=longer, seed=0)
    counts = torch.arange(frames) < lengths.unsqueeze(1)
    if frames == 6:
        counts &= batch["labels"] != -100
    new, old = model.head(others)[counts].log_softmax(-1), source.head(others)[counts].log_softmax(-1).detach()
    kl = (old.exp() * (old - new)).sum(-1).mean()
    close_after(adaptation.model, model, loss(model.head(batch["inputs"]), batch) + 1.5 * kl)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"clip": 0.1},
        {"batch_size": "auto", "epochs": 2},
        {"ema": 0.9},
        {"hold": "never"},
        {"mixup": 0.5},
        {"accumulate": 2, "batch_size": 5},
    ],
)
def test_beside_other_settings(changes):
    """The proxies are of the batch as it is: mixed images keep their copies unmixed."""
    if "mixup" in changes:
        pytest.importorskip("torchvision")
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.OutputConservation(weight=1.0)])
    images, seen = torch.randn(12, 3, 2, 2), []

    def noted(batch, generator):
        seen.append(all(any(torch.equal(one, image) for image in images) for one in batch[0]))
        return doubled(batch, generator)

    training = ctl.Training(**{**ONE.model_dump(exclude_unset=True), **changes})
    result = ctl.fit(adaptation, (images, Y), training=training, proxies=noted, seed=0)
    assert seen
    assert all(seen)
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in result.history)
    assert not result.kept_outputs
