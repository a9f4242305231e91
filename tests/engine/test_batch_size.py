"""The largest batch that fits is found before training, or named when a step runs out of memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import conservtl as ctl
from conservtl.engine.batch_size import is_out_of_memory, largest


class Small:
    """A forward that runs out of memory beyond so many examples, and counts its calls with gradients."""

    def __init__(self, room, error=None):
        self.room, self.tried = room, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    def __call__(self, model, batch):
        if torch.is_grad_enabled():
            self.tried.append(len(batch[0]))
            if len(batch[0]) > self.room:
                raise self.error
        return model(batch[0])


def settings(**fields):
    return ctl.Training(**{"epochs": 1, "batch_size": "auto", "device": "cpu", "optimizer": "sgd", "lr": 0.1, **fields})


@pytest.mark.parametrize(
    ("candidates", "room", "expected"),
    [
        ([1, 2, 4, 8, 16], 11, 8),
        ([1, 2, 4, 8, 16], 100, 16),
        ([1, 2, 4, 8, 16], 0, None),
        ([2, 3, 4, 6, 8, 12, 24], 7, 6),
        ([2, 3, 4, 6, 8, 12, 24], 23, 12),
        ([5], 5, 5),
        ([], 5, None),
    ],
)
def test_the_largest_is_found_by_few_tries(candidates, room, expected):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= room

    assert largest(candidates, fits) == expected
    assert len(tried) == len(set(tried)) <= len(candidates)


def test_bisection_spares_tries():
    tried = []
    assert largest(range(1, 1001), lambda size: not tried.append(size) and size <= 700) == 700
    assert len(tried) < 22


class TestAuto:
    @pytest.mark.parametrize(("room", "size"), [(20, 16), (16, 16), (15, 8), (3, 2), (1000, 32)])
    def test_the_largest_power_of_two(self, plain, data, room, size):
        small = Small(room)
        result = ctl.fit(plain(), data, training=settings(), forward=small, seed=0)
        assert f"batches of {size}" in result.execution
        assert result.steps == -(-50 // size)

    def test_a_run_with_that_size_is_the_same(self, plain, data, same):
        """Looking for it leaves weights, buffers and random generators alone."""
        found, named = (
            plain(ctl.L2SP(alpha=0.1), ctl.FeatureConservation()),
            plain(ctl.L2SP(alpha=0.1), ctl.FeatureConservation()),
        )
        ctl.fit(found, data, training=settings(epochs=2), forward=Small(17), seed=0)
        ctl.fit(named, data, training=settings(epochs=2, batch_size=16), forward=Small(17), seed=0)
        assert same(found.model, named.model)

    @pytest.mark.parametrize(
        ("together", "room", "size", "accumulate"), [(48, 13, 12, 4), (48, 64, 48, 1), (7, 5, 1, 7)]
    )
    def test_a_named_global_batch_is_kept_by_accumulation(self, plain, data, together, room, size, accumulate):
        adaptation = plain(ctl.LayerTransfer(side="input", layers=2))  # whose norms take one example
        training = settings(global_batch_size=together, batch_norm="eval")
        result = ctl.fit(adaptation, data, training=training, forward=Small(room), seed=0)
        assert f"batches of {size}" in result.execution
        assert (f"{accumulate} batches a step" in result.execution) == (accumulate > 1)

    def test_a_dataset(self, plain, data):
        result = ctl.fit(plain(), Plain(data), training=settings(), forward=Small(9))
        assert "batches of 8" in result.execution

    def test_the_phase_that_trains_most_decides(self, plain, data):
        seen = []

        def forward(model, batch):
            if torch.is_grad_enabled():
                seen.append(sum(one.requires_grad for one in model.parameters()))
            return model(batch[0])

        adaptation = plain(ctl.GradualUnfreezing(by="layer"))
        ctl.fit(adaptation, data, training=settings(epochs=3), forward=forward, seed=0)
        assert seen[0] == len(list(adaptation.model.parameters()))
        assert seen[-1] <= seen[0]

    def test_a_resumed_run_keeps_it(self, plain, data, tmp_path):
        """The memory may be another now, and another size would be another run."""

        def stop(_):
            raise InterruptedError

        with pytest.raises(InterruptedError):
            ctl.fit(plain(), data, training=settings(epochs=2), forward=Small(20), out=tmp_path, tell=stop, seed=0)
        small = Small(40)
        result = ctl.fit(plain(), data, training=settings(epochs=2), forward=small, out=tmp_path, resume=True)
        assert "batches of 16" in result.execution
        assert max(small.tried) <= 17

    def test_nothing_fits(self, plain, data):
        with pytest.raises(ctl.MemoryLimitError, match=r"batch_size is auto, but a step runs out of memory on cpu"):
            ctl.fit(plain(), data, training=settings(), forward=Small(0))

    def test_other_errors_are_not_taken_for_it(self, plain, data):
        with pytest.raises(RuntimeError, match="shape"):
            ctl.fit(plain(), data, training=settings(), forward=Small(8, RuntimeError("wrong shape")))

    def test_data_in_batches_of_its_own_is_refused(self, plain, data):
        with pytest.raises(ctl.SpecError, match=r"batch_size is auto, but the data comes in batches of its own"):
            ctl.fit(plain(), DataLoader(TensorDataset(*data), 8), training=settings())

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"global_batch_size": 32}, "global_batch_size is for a batch_size of auto; received batch_size=64"),
            ({"batch_size": "auto", "global_batch_size": 32, "accumulate": 2}, "received accumulate=2 too"),
            ({"batch_size": "largest"}, "batch_size"),
            ({"batch_size": "auto", "global_batch_size": 0}, "global_batch_size"),
        ],
    )
    def test_settings_that_contradict_each_other(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ctl.Training(**fields)


class Plain(torch.utils.data.Dataset):
    """Examples that are read one by one."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        return self.data[0][index], self.data[1][index]


class TestOutOfMemory:
    def test_the_sizes_that_fit_are_named(self, plain, data):
        training = settings(batch_size=24, accumulate=2)
        with pytest.raises(ctl.MemoryLimitError) as caught:
            ctl.fit(plain(), data, training=training, forward=Small(9))
        assert str(caught.value) == (
            "a step with training.batch_size=24 and accumulate=2 ran out of memory on cpu (CUDA out of memory. Tried "
            "to allocate 2.00 GiB). batch_size=8 with accumulate=6 fits and makes the same steps; batch_size: auto "
            "finds it for data that fit batches."
        )

    def test_they_fit(self, plain, data):
        training = settings(batch_size=8, accumulate=6)
        assert ctl.fit(plain(), data, training=training, forward=Small(9)).steps == 2

    def test_the_batches_of_a_loader(self, plain, data):
        loader = DataLoader(TensorDataset(*data), 10)
        with pytest.raises(ctl.MemoryLimitError, match="batch_size=5 with accumulate=2 fits"):
            ctl.fit(plain(), loader, training=settings(batch_size=64), forward=Small(6))

    def test_no_part_fits(self, plain, data):
        with pytest.raises(ctl.MemoryLimitError, match="no part of the batch fits"):
            ctl.fit(plain(), data, training=settings(batch_size=16), forward=Small(0))

    def test_a_cpu_says_it_otherwise(self):
        assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
        assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        assert not is_out_of_memory(ValueError("out of memory"))
