"""Checkpoints that cannot be mixed are refused by name: types, missing files, files of two models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import conservtl as ctl
from conservtl.weights import checkpoints
from conservtl.weights.checkpoints import open_checkpoint

STATE = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(2)}


def refused(source, message):
    with pytest.raises(ctl.SourceError, match=message), open_checkpoint(source):
        pass


def shards(folder, files):
    folder.mkdir()
    for file in set(files.values()):
        save_file({name: STATE[name] for name, owner in files.items() if owner == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return index


def test_a_type_that_safetensors_cannot_hold():
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    refused({"w": quantised}, r"'w' has torch\.qint8\. Convert it")


@pytest.mark.parametrize("source", [3, None, [STATE], b"weights"])
def test_a_source_of_another_kind(source):
    refused(source, rf"must be a path, a name, a state dict or a model; received {type(source).__name__}")


def test_a_model_is_its_own_checkpoint():
    model = torch.nn.Linear(3, 2)
    with open_checkpoint(torch.nn.DataParallel(model)) as found:
        assert found.where == "source Linear"
        assert {name: entry.shape for name, entry in found.entries.items()} == {"weight": (2, 3), "bias": (2,)}


def test_a_file_that_an_index_lists_is_missing(tmp_path):
    shards(tmp_path / "m", {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"})
    (tmp_path / "m" / "model-2.safetensors").unlink()
    refused(tmp_path / "m", r"model-2\.safetensors is missing, which model\.safetensors\.index\.json lists")


def test_files_of_two_models(tmp_path):
    index = shards(tmp_path / "m", {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"})
    files = {"a.weight": "model-2.safetensors", "b.weight": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": files}))
    refused(
        tmp_path / "m", r"model-2\.safetensors has no tensor 'a\.weight', which model\.safetensors\.index\.json says"
    )


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    index = shards(tmp_path / "m", {"a.weight": "model-1.safetensors"})
    save_file(STATE, tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"a.weight": name}}))
    refused(tmp_path / "m", r"must list files beside it|is missing")


def test_two_names_that_differ_by_a_wrapper_s_prefix_alone(tmp_path):
    save_file({"a._orig_mod.w": torch.ones(1), "a.w": torch.zeros(1)}, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "a._orig_mod.w")


def test_a_type_that_cannot_be_mixed(tmp_path, monkeypatch):
    monkeypatch.delitem(checkpoints._TYPES, "F32")
    save_file(STATE, tmp_path / "model.safetensors")
    refused(tmp_path, r"'a\.weight' has the type F32, which cannot be mixed")


def test_a_folder_with_one_file(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as found:
        assert found.folder == tmp_path
        assert torch.equal(found.read("a.weight"), STATE["a.weight"])
