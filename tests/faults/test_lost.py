"""Distributed runs of which a process is lost or told to stop end soon, with a checkpoint to go on from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("lost.py")
CODES = {
    "the first replica is killed": [-9, 1],
    "a replica raises": [1, 1],
    "a shard is killed": [1, -9],
    "one replica is terminated": [143, 143],
    "one shard is interrupted": [130, 130],
}


@pytest.fixture(scope="module")
def found(python):
    if not hasattr(os, "fork") or not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs fork and gloo")
    ended = python(SCRIPT)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("case", CODES)
def test_the_others_stop_and_the_run_goes_on(found, case):
    """One process resumes what two began; its weights are those of two that nobody touched."""
    ended = found[case]
    assert ended["codes"] == CODES[case], ended["output"]
    assert ended["seconds"] < 60
    assert ended["resumed"] == 0, ended["rest"]
    assert ended["difference"] < 1e-5
    said = [line for line in ended["output"].splitlines() if line.startswith("conservtl: ")]
    assert len(said) == 1
    if CODES[case][0] in (130, 143):
        assert "interrupted" in said[0]
    else:
        lost = 0 if "first" in case else 1
        assert f"rank {lost} of 2 stopped" in said[0]
        assert said[0].startswith("conservtl: rank 1: ") == (lost == 0)


def test_one_process_of_a_run_prints(found):
    said = [line for line in found["whole"]["output"].splitlines() if "reducer.cpp" not in line]
    assert said == []  # the command prints the table, not the run
