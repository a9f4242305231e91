"""Triton programs without a GPU, by Triton's interpreter in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conservtl.kernels import backend
from conservtl.kernels.backend import fused_on
from conservtl.kernels.philox import words
from conservtl.kernels.pull import kept

HERE = Path(__file__).parent
triton = pytest.importorskip("triton")

METHODS = "l2_sp or fisher or projection or selective or l1_sp or lasso or mixout or auto_rgn"


def interpreted(chosen, *places):
    """Run tests in a process in which programs act on CPU tensors: Triton reads its settings when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CONSERVTL_TRITON": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *map(str, places), "-k", chosen]
    command += ["-W", "ignore::RuntimeWarning"]  # NumPy, which interprets them, warns of each overflow and NaN
    how = {"capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], check=False, **how)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_programs_compute_what_their_formulas_say():
    """And keep the contract of all methods: a step in float64 by the formula, the law of resuming, the step's hook."""
    laws = "what_the_formula_says or (resuming and laws_of_a_step)"
    steps = "step_hook and not never_stale"
    chosen = f"fused_pulls or fused_calls or fused_moves or fused_places or (({METHODS}) and ({laws})) or ({steps})"
    places = HERE.parent / "test_conservation.py", HERE.parent / "runtime" / "test_step_hook.py"
    interpreted(chosen, *sorted((HERE / "interpreted").glob("fused_*.py")), *places)


@pytest.mark.slow
def test_programs_act_on_shards_and_on_tensors_that_are_replaced():
    """Two processes, with replicas and with FSDP2; parameters that are moved or frozen between steps."""
    interpreted("distributed or never_stale or runner", HERE.parent / "test_distributed.py", HERE.parent / "runtime")


@pytest.mark.parametrize(
    ("triton_asked", "interpreted", "cuda", "cpu"),
    [(None, None, True, False), ("0", "1", False, False), ("1", None, True, False), ("1", "1", True, True),
     (None, "1", True, False)],
)  # fmt: skip
def test_what_the_environment_says(triton_asked, interpreted, cuda, cpu, monkeypatch):
    for name, value in (("CONSERVTL_TRITON", triton_asked), ("TRITON_INTERPRET", interpreted)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    for name in ("_available", "_interpreted"):
        monkeypatch.setattr(backend, name, getattr(backend, name).__wrapped__)
    assert [fused_on(torch.device(one)) for one in ("cuda", "cpu", "meta")] == [cuda, cpu, False]


def test_torch_acts_on_the_cpu():
    """The programs are for a GPU: here they would be interpreted."""
    assert not fused_on(torch.device("cpu"))


def test_words_are_those_of_the_reference_implementation():
    """Philox4x32-10 of Random123 with key and counter zero: words 0 to 3 of counter 0."""
    found = words(2048, seed=0, step=0, tensor=0)[::512].tolist()
    assert [f"{word:08x}" for word in found] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def philox(counter, key):
    """Philox4x32-10 in whole numbers, by its definition."""
    (a, b, c, d), (one, two) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ one, second & 0xFFFFFFFF, first >> 32 ^ d ^ two, first & 0xFFFFFFFF
        one, two = one + 0x9E3779B9 & 0xFFFFFFFF, two + 0xBB67AE85 & 0xFFFFFFFF
    return a, b, c, d


@pytest.mark.parametrize("place", [0, 1, 511, 512, 2047, 2048, 2048 + 1536 + 7])
def test_words_of_a_large_seed_by_whole_numbers(place):
    """Element 512 q + i of a block of 2,048 takes word q of counter i."""
    seed, step, tensor = 0x299F31D0A4093822, 0x03707344, 0x93198A2E
    block, inside = divmod(place, 2048)
    counter = (512 * block + inside % 512, 0, tensor, step)
    expected = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[inside // 512]
    assert int(words(place + 1, seed, step, tensor)[place]) == expected


def test_words_are_uniform_and_differ():
    drawn = {key: words(4096, *key) for key in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))}
    for word in drawn.values():
        assert abs(word.double().mean() / 2**31 - 1) < 0.05
        assert len(word.unique()) > 4090
    assert len({tuple(word.tolist()) for word in drawn.values()}) == 4


@pytest.mark.parametrize("every", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("share", [1e-9, 0.01, 0.5, 1.0])
def test_the_share_of_many_steps(share, every):
    """Small shares lose no digits, as 1 - (1 - s)^k would."""
    from math import expm1, log1p

    exact = -expm1(every * log1p(-share)) if share < 1 else 1.0
    assert kept(share, every) == pytest.approx(exact, rel=1e-14)
    assert float(kept(torch.tensor(share), every)) == pytest.approx(exact, rel=1e-6)


class Compiled:
    """A program, and what Triton would return for its first launch."""

    def __init__(self):
        self.found, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments):
            self.found.append((grid, arguments))
            return Launched(self.launched)

        return run


class Launched:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Placed:
    device = torch.device("cuda", 0)

    def __init__(self, place, dtype=torch.float32):
        self.place, self.dtype = place, dtype

    def data_ptr(self):
        return self.place


def test_a_compiled_program_is_launched_again_only_where_triton_would_find_it(monkeypatch):
    """Other types, other numbers in the sense of Triton, a place that is no multiple of 16: it is looked up anew."""
    from conservtl.kernels.fused.calls import call

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    program = Compiled()
    first = [Placed(64), Placed(128)], (5, 0.5), (True, "sum")
    for number in range(3):
        call(program, (7,), [Placed(64), Placed(256 + 16 * number)], (6 + number, 0.1 * number), (True, "sum"))
    assert len(program.found) == 1
    assert [grid for grid, _ in program.launched] == [(7, 1, 1)] * 2
    assert program.launched[-1][1][2:] == (8, 0.2, True, "sum")
    for tensors, numbers, constants in (
        ([Placed(64), Placed(132)], *first[1:]),
        ([Placed(64), Placed(128, torch.float64)], *first[1:]),
        (first[0], (1, 0.5), first[2]),
        (first[0], (16, 0.5), first[2]),
        (first[0], (1 << 40, 0.5), first[2]),
        (*first[:2], (False, "sum")),
    ):
        before = len(program.found)
        call(program, (7, 2), tensors, numbers, constants)
        assert len(program.found) == before + 1


@pytest.mark.parametrize("number", [1e-3, 0.1, -3.7e-9, 12345.678, 1.0])
def test_numbers_of_the_host_keep_48_bits(number):
    from conservtl.kernels.fused.calls import parted

    high, low = (torch.tensor(part, dtype=torch.float32).double() for part in parted(number))
    assert float(high + low) == pytest.approx(number, rel=2**-47)
