"""The largest batch that fits is found before training, or named when a step runs out of memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import conservtl as ctl
from conservtl.data import Sequences
from conservtl.engine.batch_size import find_batch_size, is_out_of_memory, largest
from conservtl.engine.held import Held
from conservtl.engine.processes import Processes
from conservtl.engine.resizing import _reloaded, sizes_of
from conservtl.errors import counted


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

    @pytest.mark.parametrize(
        ("loader", "reason"),
        [
            (lambda made: [(made[0][:8], made[1][:8])], "a list yields batches of its"),
            (lambda made: Loader(made, 8), "only a plain DataLoader can be made anew; received a Loader. Pass its"),
            (lambda made: DataLoader(made, batch_size=None), "batch_size=None, so its dataset makes the batches. Give"),
            (lambda made: DataLoader(made, batch_sampler=[[0, 1]]), "DataLoader's list makes the batches. Give it a"),
        ],
    )
    def test_data_in_batches_of_its_own_is_refused(self, plain, data, loader, reason):
        given = loader(data if reason.startswith("a list") else TensorDataset(*data))
        with pytest.raises(ctl.SpecError, match=r"batch_size is auto, but the data comes in batches of its own") as why:
            ctl.fit(plain(), given, training=settings())
        assert reason in str(why.value)

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


class TestLoaders:
    """A DataLoader is made anew; everything but the size of its batches stays."""

    @pytest.mark.parametrize(
        "kind", ["shuffled", "own sampler and generator", "own batch sampler", "collated", "stream"]
    )
    def test_a_run_is_that_of_a_loader_of_the_size_that_was_found(self, plain, data, same, kind):
        def loader(size):
            dataset = TensorDataset(*data)
            if kind == "shuffled":
                return DataLoader(dataset, size, shuffle=True)
            if kind == "own sampler and generator":
                drawn = RandomSampler(dataset, generator=torch.Generator().manual_seed(7))
                return DataLoader(dataset, size, sampler=drawn, drop_last=True, generator=torch.Generator())
            if kind == "own batch sampler":
                return DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), size, True))
            if kind == "collated":
                return DataLoader(dataset, size, collate_fn=backwards)
            return DataLoader(Stream(data), size)

        small, found, named = Small(17), plain(), plain()
        result = ctl.fit(found, loader(4), training=settings(epochs=2), forward=small, seed=0)
        ctl.fit(named, loader(16), training=settings(epochs=2), forward=Small(17), seed=0)
        assert "batches of 16" in result.execution
        assert same(found.model, named.model)
        assert max(small.tried) == 32

    def test_a_stream_shorter_than_what_fits(self, plain, data):
        """50 examples: 32 fill a batch, and 64 do not."""
        result = ctl.fit(plain(), DataLoader(Stream(data), 4), training=settings(), forward=Small(1000), seed=0)
        assert "batches of 32" in result.execution

    def test_a_resumed_run_keeps_it(self, plain, data, same, tmp_path):
        loader = DataLoader(TensorDataset(*data), 4, shuffle=True)

        def stop(_):
            raise InterruptedError

        whole, broken = plain(), plain()
        ctl.fit(whole, loader, training=settings(epochs=2), forward=Small(17), seed=0)
        with pytest.raises(InterruptedError):
            ctl.fit(broken, loader, training=settings(epochs=2), forward=Small(17), out=tmp_path, tell=stop, seed=0)
        again = {"out": tmp_path, "resume": True}
        result = ctl.fit(broken, loader, training=settings(epochs=2), forward=Small(1000), **again)
        assert "batches of 16" in result.execution
        assert same(whole.model, broken.model)

    def test_workers_and_memory_stay(self, data):
        asked = {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 3, "timeout": 9, "drop_last": True}
        made = _reloaded(DataLoader(TensorDataset(*data), 4, worker_init_fn=print, **asked), 16)
        assert {name: getattr(made, name) for name in asked} == asked
        assert (made.batch_size, made.worker_init_fn) == (16, print)
        alone = _reloaded(made, 2, alone=True)
        assert (alone.batch_size, alone.num_workers, alone.drop_last) == (2, 0, True)


class TestSequences:
    """Lengths of 1 to 12 positions, a second each: the seconds of a batch are found."""

    LENGTHS = (1, 2, 2, 3, 5, 6, 6, 7, 9, 10, 11, 12)

    @pytest.fixture
    def sequences(self):
        made = tuple(torch.randn(length, 3) for length in self.LENGTHS)
        labels = tuple(torch.tensor([1]) for _ in made)
        return Sequences(made, labels, tuple(map(str, range(12))), (), tuple(map(float, self.LENGTHS)))

    def run(self, sequences, most, **fields):
        seen = []

        def forward(model, batch):
            if torch.is_grad_enabled():
                seen.append(batch["inputs"].shape[:2].numel())
                if seen[-1] > most:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            return model(batch["inputs"].sum(1))

        adaptation = ctl.adapt(model := torch.nn.Linear(3, 4), model.state_dict(), [])
        training = settings(**fields)
        result = ctl.fit(adaptation, sequences, training=training, forward=forward, loss=first_labels, metrics=none)
        return result, seen

    @pytest.mark.parametrize(("most", "found"), [(12, 12), (30, 24), (49, 48), (1000, 48)])
    def test_the_seconds_of_a_batch(self, sequences, most, found):
        """1, 2 or 4 of the longest, of 74 s together."""
        result, _ = self.run(sequences, most)
        assert f"batches of at most {found} s and 12 examples" in result.execution

    @pytest.mark.parametrize(("room", "found"), [(20, 1), (25, 2), (30, 8)])
    def test_the_number_in_a_batch_of_named_seconds(self, sequences, room, found):
        """Two of the longest are 24 positions, and 5, 6, 6 and 7 together 28 with padding."""
        result, seen = self.run(sequences, room, batch_seconds=28.0)
        assert f"at most 28 s and {counted(found, 'example')}" in result.execution
        assert max(seen[-result.steps :]) <= room

    def test_the_seconds_of_a_step_bound_it(self, sequences):
        result, _ = self.run(sequences, 1000, step_seconds=30.0)
        assert "at most 24 s" in result.execution

    def test_not_even_the_longest_fits(self, sequences):
        with pytest.raises(ctl.MemoryLimitError, match="with one sequence already"):
            self.run(sequences, 11)

    def test_examples_a_step_are_refused(self, sequences):
        with pytest.raises(ctl.SpecError, match=r"counts examples, received 8, .* Set step_seconds instead"):
            self.run(sequences, 100, global_batch_size=8)


class TestProcesses:
    def test_the_least_of_all_processes(self, plain, data, monkeypatch):
        monkeypatch.setattr(Processes, "gathered", lambda _, value: [value, 4] if isinstance(value, int) else [value])
        result = ctl.fit(plain(), data, training=settings(), forward=Small(20), seed=0)
        assert "batches of 4" in result.execution

    def session(self, **fields):
        return SimpleNamespace(
            training=settings(**fields), processes=Processes(0, 2), device=torch.device("cpu"), accelerator=None
        )

    def test_each_has_its_share_of_a_step(self, data):
        """48 examples a step are 24 for each of two."""
        held = Held(data, 2, torch.device("cpu"))
        sizes = sizes_of(self.session(global_batch_size=48), data, held)
        assert sizes.candidates == [2, 3, 4, 6, 8, 12, 24]
        assert sizes.settings(8) == {"batch_size": 8, "accumulate": 3}
        with pytest.raises(ctl.SpecError, match=r"multiple of the number of processes, 2; received 47. Set it to 46"):
            sizes_of(self.session(global_batch_size=47), data, held)

    def test_a_batch_of_all_is_in_the_data(self, data):
        sizes = sizes_of(self.session(), data, Held(data, 2, torch.device("cpu")))
        assert sizes.candidates == [2, 4, 8, 16]  # of 50 examples 25 are for each

    def test_shards_are_refused(self, plain, data):
        session = SimpleNamespace(**vars(self.session()), shards=True)
        with pytest.raises(ctl.SpecError, match="parameters are sharded once training begins"):
            find_batch_size(session, None, data, None)


class Loader(DataLoader):
    """One that may batch in a way of its own."""


class Stream(torch.utils.data.IterableDataset):
    """Examples in their order."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return zip(*self.data, strict=True)


def backwards(examples):
    inputs, labels = zip(*examples[::-1], strict=True)
    return torch.stack(inputs), torch.stack(labels)


def first_labels(outputs, batch):
    return torch.nn.functional.cross_entropy(outputs, batch["labels"][:, 0])


def none(outputs, batch):
    return {}


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
