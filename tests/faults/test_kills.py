"""Runs and comparisons killed at random moments end as undisturbed ones do."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs Optuna")
def test_every_killed_run_is_resumed_bit_for_bit(python):
    ended = python(SCRIPT, "--chains", 1, "--kills", 3, "--comparisons", 1)
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout)
    assert [counts[kind]["equal"] for kind in ("run", "compare", "sweep", "tune")] == [1, 1, 1, 1]
    assert counts["run"]["kills"] + counts["compare"]["kills"] > 0
    assert sum(counts[kind]["kept"] for kind in ("compare", "sweep", "tune")) > 0
    assert [counts[kind]["changed"] for kind in ("compare", "sweep", "tune")] == [0, 0, 0]
