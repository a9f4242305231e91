"""Datasets loaded by workers, and data held where the settings say: the same run each time."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import conservtl as ctl
from conservtl.engine.batching import as_batches
from conservtl.engine.held import Held
from conservtl.engine.holding import Holding
from conservtl.engine.workers import number_of_workers

CPU = torch.device("cpu")


class Noisy(Dataset):
    """Examples that draw a number of their own each time."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        return self.data[0][index] + 0.1 * torch.randn(()), self.data[1][index]


class TestWorkers:
    def trained(self, plain, data, workers):
        adaptation = plain(ctl.L2SP(alpha=0.1))
        training = ctl.Training(epochs=2, batch_size=16, lr=0.05, device="cpu", num_workers=workers)
        ctl.fit(adaptation, Noisy(data), {"target": data}, training, seed=3)
        return adaptation.model

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_the_run_does_not_depend_on_their_number(self, plain, data, same):
        none = self.trained(plain, data, 0)
        assert same(none, self.trained(plain, data, 1))
        assert same(none, self.trained(plain, data, 2))

    def test_each_epoch_draws_anew_and_in_a_new_order(self, data):
        torch.manual_seed(0)
        batches = as_batches(Noisy(data), 16, CPU, shuffle=True, workers=0)
        assert batches.count() == 4
        first, second = ([batch.content for batch in batches.epoch()] for _ in range(2))
        assert not torch.equal(first[0][1], second[0][1])
        assert sorted(torch.cat([labels for _, labels in first]).tolist()) == sorted(data[1].tolist())
        noise = torch.cat([inputs for inputs, _ in first]).sum() - data[0].sum()
        assert noise != torch.cat([inputs for inputs, _ in second]).sum() - data[0].sum()

    def test_the_generators_of_training_are_those_of_a_plain_loader(self, data):
        """Examples that draw nothing give the same batches as before, and leave the same generator."""
        exact = [(a, b) for a, b in zip(*data, strict=True)]

        class Exact(Noisy):
            def __getitem__(self, index):
                return exact[index]

        found = []
        for workers in (None, 0):
            torch.manual_seed(5)
            batches = as_batches(Exact(data), 16, CPU, shuffle=True, workers=workers)
            found.append([torch.cat([batch.content[1] for batch in batches.epoch()]), torch.rand(3)])
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_loader_whose_workers_stay_goes_on_in_the_same_order(self, plain, data, same, tmp_path):
        """It draws a seed for them in the first epoch alone, from the generator that its order comes from."""

        def trained(**options):
            adaptation = plain()
            training = ctl.Training(epochs=3, lr=0.05, device="cpu")
            loader = DataLoader(TensorDataset(*data), 16, shuffle=True, num_workers=1, persistent_workers=True)
            with suppress(InterruptedError):
                ctl.fit(adaptation, loader, training=training, seed=3, **options)
            return adaptation.model

        def stop(line):
            if line["epoch"] == 1:
                raise InterruptedError

        trained(out=tmp_path, tell=stop)
        assert same(trained(out=tmp_path, resume=True), trained())

    def test_a_stream_that_divides_itself_is_refused(self, plain, data):
        """Each of many workers would load all of it."""

        class Stream(IterableDataset):
            def __iter__(self):
                return zip(*data, strict=True)

        for number in ("auto", 0):
            ctl.fit(plain(), Stream(), training=ctl.Training(epochs=1, device="cpu", num_workers=number))
        with pytest.raises(ctl.SpecError, match=r"num_workers is 2, but an IterableDataset .* Pass DataLoader"):
            ctl.fit(plain(), Stream(), training=ctl.Training(epochs=1, device="cpu", num_workers=2))

    def test_auto_is_none_on_a_cpu(self):
        assert number_of_workers("auto", CPU) is None
        assert number_of_workers(0, CPU) == 0
        assert number_of_workers(3, CPU) == 3
        assert 1 <= (number_of_workers("auto", torch.device("cuda")) or 1) <= 8

    @pytest.mark.parametrize("number", [-1, "many", 1.5])
    def test_other_numbers_are_refused(self, number):
        with pytest.raises(ValueError, match="num_workers"):
            ctl.Training(num_workers=number)


class TestHolding:
    CUDA = torch.device("cuda")

    def test_sets_share_the_budget(self):
        holding = Holding("auto", memory=1.0)
        assert holding.place(3 << 28, self.CUDA) == self.CUDA
        assert holding.place(3 << 28, self.CUDA) == CPU
        assert holding.place(1 << 28, self.CUDA) == self.CUDA
        assert holding.place(1, self.CUDA) == CPU

    def test_without_a_budget_half_of_what_is_free(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 4000))
        assert Holding().place(500, self.CUDA) == self.CUDA
        assert Holding().place(501, self.CUDA) == CPU

    def test_the_host_holds_if_the_settings_say_so(self):
        assert Holding("host").place(1, self.CUDA) == CPU
        assert Holding("device").place(1 << 50, CPU) == CPU

    def test_more_than_the_budget_is_refused(self):
        with pytest.raises(ctl.SpecError, match=r"hold is device, but the data takes 2 GiB, and 1 GiB .*hold_memory"):
            Holding("device", memory=1.0).place(2 << 30, self.CUDA)

    def test_data_held_by_the_host_is_copied_batch_by_batch(self, data):
        held = Held(data, 16, torch.device("meta"), shuffle=False, holding=Holding("host"))
        batches = list(held.epoch())
        assert [batch.size for batch in batches] == [16, 16, 16, 2]
        assert {one.device.type for batch in batches for one in batch.content} == {"meta"}
        assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(50))

    def test_positions_of_data_on_a_device_are_known_to_the_host(self, data):
        """What the host holds beside the data, such as cached outputs, is read by them without a wait."""
        held = Held(data, 16, torch.device("meta"), shuffle=False, holding=Holding(memory=1.0))
        batches = list(held.epoch())
        assert {one.device.type for batch in batches for one in batch.content} == {"meta"}
        assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(50))

    @pytest.mark.parametrize("hold", ["device", "host"])
    def test_on_a_cpu_the_run_is_the_same(self, plain, data, same, hold):
        models = []
        for choice in ("auto", hold):
            adaptation = plain()
            training = ctl.Training(epochs=1, batch_size=16, device="cpu", hold=choice, hold_memory=1e-6)
            ctl.fit(adaptation, data, training=training, seed=1)
            models.append(adaptation.model)
        assert same(*models)

    @pytest.mark.parametrize("fields", [{"hold": "disk"}, {"hold_memory": 0}, {"hold_memory": float("inf")}])
    def test_other_values_are_refused(self, fields):
        with pytest.raises(ValueError, match=next(iter(fields))):
            ctl.Training(**fields)
