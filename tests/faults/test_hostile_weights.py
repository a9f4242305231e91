"""Weights from strangers are adapted from or refused in one bounded message; nothing is executed."""

from __future__ import annotations

import os
import time
import warnings

import hostile_weights as hostile
import pytest

import conservtl as ctl

READ = {
    "no dimension": "fresh",
    "no dimension, bias": "fresh",
    "text for a tensor": "ignored entries that are not tensors: body.weight",
    "stride 0, of the right shape": "",
    "lists that multiply": "ignored entries that are not tensors: more",
    "older format": "",
    "right, safetensors": "",
    "right": "took the entry 'state_dict'",
}


@pytest.mark.parametrize("name", hostile.by_hand())
def test_made_by_hand(name, tmp_path):
    """What can be taken is taken, and the plan says what was not; everything else is refused."""
    suffix, make = hostile.by_hand()[name]
    path = tmp_path / f"weights{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes of torch
        path.write_bytes(make())
    begun = time.process_time()
    if name in READ:
        assert READ[name] in str(ctl.adapt(hostile.model(), path, [ctl.L2SP(alpha=0.1)]).plan)
    else:
        warnings.simplefilter("ignore")  # pytest restores the filters
        with pytest.raises(ctl.SourceError) as refused:
            ctl.adapt(hostile.model(), path, [ctl.L2SP(alpha=0.1)])
        assert 20 < len(str(refused.value)) < 1200
        assert "weights" in str(refused.value)
    assert time.process_time() - begun < 5
    assert hostile.EXECUTED not in os.environ


def test_hundreds_of_damaged_files_are_read_or_refused():
    result = hostile.main(["--files", "400", "--seed", "7"])
    assert result["wrong"] == []
    assert result["counts"]["read"] > 10
    assert result["counts"]["refused"] > 200


@pytest.mark.parametrize("name", ["our header is a list", "our header lies", "our header is deep", "shape too large"])
def test_a_saved_model_with_such_a_header_is_refused(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(hostile.by_hand()[name][1]())
    with pytest.raises(ctl.SourceError, match=r"model\.safetensors"):
        ctl.load_adapted(tmp_path)
