"""Files of tensors with checksums."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import conservtl as ctl
from conservtl.storage.tensor_files import load_tensors, read_header, save_tensors

SHARED = torch.arange(12.0)
TENSORS = {
    "whole": SHARED,
    "rows": SHARED.view(3, 4)[1:],
    "columns": SHARED.view(3, 4).t(),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


def test_tensors_come_back_with_what_else_the_header_holds(tmp_path):
    save_tensors(TENSORS, tmp_path / "new" / "t.safetensors", {"labels": ["yes", "no"]})
    loaded = load_tensors(tmp_path / "new" / "t.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert read_header(tmp_path / "new" / "t.safetensors") == {"labels": ["yes", "no"]}


def test_any_flipped_bit_is_found(tmp_path):
    """Either the file cannot be read, or its checksum differs; only unused bytes of the header may change unseen."""
    path = tmp_path / "t.safetensors"
    tensors = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor([7])}
    save_tensors(tensors, path)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            loaded = load_tensors(path)
        except ctl.SourceError:
            continue
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items()), place
    start = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    damaged[start] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ctl.SourceError, match="its checksum differs"):
        load_tensors(path)


def test_files_without_a_checksum_are_read(tmp_path):
    """Those of earlier versions, and of other programs."""
    save_file({"w": torch.ones(2)}, tmp_path / "t.safetensors", {"conservtl": json.dumps({})})
    assert torch.equal(load_tensors(tmp_path / "t.safetensors")["w"], torch.ones(2))
    assert read_header(tmp_path / "t.safetensors") is None


def test_a_missing_or_torn_file_is_named(tmp_path):
    with pytest.raises(ctl.SourceError, match=r"no\.safetensors' cannot be read"):
        load_tensors(tmp_path / "no.safetensors")
    save_tensors({"w": torch.ones(200)}, tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes()[:300])
    with pytest.raises(ctl.SourceError, match=r"t\.safetensors' cannot be read"):
        load_tensors(tmp_path / "t.safetensors")
