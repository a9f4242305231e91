"""Folders as ``save_pretrained`` writes them, in one file or in shards; read without a second copy in memory."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import conservtl as ctl
from conservtl.source.read import read_source
from conservtl.weights.checkpoints import open_checkpoint


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(tensor.shape, generator=generator) for name, tensor in network().state_dict().items()}


def write(folder, state, ending="safetensors", weight_map=None):
    """Write a state dict in two shards with an index, each layer in its own."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    files = {name: f"{stem}-0000{1 + int(name[0]) % 2}-of-00002.{ending}" for name in state}
    for file in set(files.values()):
        part = {name: state[name] for name in state if files[name] == file}
        save = save_file if ending == "safetensors" else torch.save
        save(part, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files if weight_map is None else weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("as_text", [True, False])
def test_shards(tmp_path, state, ending, as_text):
    write(tmp_path, state, ending)
    (tmp_path / "config.json").write_text("{}")
    (index,) = tmp_path.glob("*.index.json")
    for path in (tmp_path, index):
        adaptation = ctl.adapt(network(), str(path) if as_text else path)
        assert all(torch.equal(adaptation.model.state_dict()[name], tensor) for name, tensor in state.items())
        assert adaptation.plan.fresh == ()


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_one_of_several_files_is_no_source(tmp_path, state, ending):
    first = tmp_path / min(set(write(tmp_path, state, ending).values()))
    (index,) = tmp_path.glob("*.index.json")
    with pytest.raises(ctl.SourceError, match=rf"it is file 1 of 2, .*Give the folder {str(tmp_path)!r}; or pass"):
        ctl.adapt(network(), first)
    with pytest.raises(ctl.SourceError, match="it is file 1 of 2"), open_checkpoint(first):
        pass
    for other in sorted(tmp_path.iterdir()):
        if other != first:
            other.unlink()
    for path in (first, tmp_path) if ending == "safetensors" else (first,):
        with pytest.raises(ctl.SourceError, match=rf"Put all files and their index {index.name} into one folder"):
            read_source(path)
    whole = first.with_name(f"model-00001-of-00001.{ending}")
    first.rename(whole)
    assert set(read_source(whole).tensors) < set(state)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_checkpoint_opened_by_its_index(tmp_path, state, ending):
    write(tmp_path, state, ending)
    (index,) = tmp_path.glob("*.index.json")
    for path in (tmp_path, index):
        with open_checkpoint(path) as checkpoint:
            assert (checkpoint.folder, checkpoint.index) == (tmp_path, index.name)
            assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())


def test_a_missing_index(tmp_path, state):
    write(tmp_path, state)
    with pytest.raises(ctl.SourceError, match=r"is not a file\. Did you mean .*model\.safetensors\.index\.json"):
        read_source(tmp_path / "model.safetensor.index.json")


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"], "model.safetensors"),
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["diffusion_pytorch_model.safetensors", "other.bin"], "diffusion_pytorch_model.safetensors"),
    ],
)
def test_one_file(tmp_path, state, names, taken):
    for name in names:
        values = state if name == taken else {"other": torch.zeros(1)}
        (save_file if name.endswith("safetensors") else torch.save)(values, tmp_path / name)
    assert all(torch.equal(read_source(tmp_path).tensors[name], tensor) for name, tensor in state.items())


def test_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(**sizes, vocab_size=40, num_labels=3)
    source = transformers.BertForSequenceClassification(config)
    source.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = transformers.BertForSequenceClassification(config)
    ctl.adapt(model, tmp_path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
            r"00002\.safetensors' is missing, which model\.s",
        ),
        (lambda f: save_file({}, f / "model-00002-of-00002.safetensors"), r"has no tensor '1\.(weight|bias)', which"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), r"must hold a weight_map.*JSONDecodeError"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "must hold a weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "must list files beside it"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'),
            "must hold a weight_map",
        ),
    ],
)
def test_a_broken_index(tmp_path, state, change, message):
    write(tmp_path, state)
    change(tmp_path)
    with pytest.raises(ctl.SourceError, match=message):
        read_source(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_leads_out_of_the_folder(tmp_path, state, file):
    write(tmp_path, state, weight_map={"0.weight": file})
    with pytest.raises(ctl.SourceError, match="must list files beside it"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_model.safetensors", "adapter_config.json"], r"it holds an adapter.*merge_and_unload"),
        (["a.safetensors", "b.safetensors"], r"is not a file.*holds a\.safetensors, b\.safetensors\. Give the path"),
        (["flax_model.msgpack", "config.json"], r"holds config\.json, flax_model\.msgpack"),
        ([], "it holds nothing"),
    ],
)
def test_a_folder_without_weights(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ctl.SourceError, match=message):
        read_source(tmp_path)


MEMORY = """
import sys, torch
import conservtl as ctl

def anonymous():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) / 1024

largest = []
finite = torch.isfinite
torch.isfinite = lambda tensor: (finite(tensor), largest.append(anonymous()))[0]  # when all is read, and checked
for folder in ("warm", *sys.argv[1:]):  # the first call imports
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 625, bias=False) for _ in range(32)))  # 80 MB
    source = {name: torch.zeros(625, 1000) for name in model.state_dict()} if folder == "warm" else folder
    del largest[:]
    before = anonymous()
    adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=0.1)])
    print(max(largest) - before, anonymous() - before)
    del model, source, adaptation
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_not_in_memory_twice(python, tmp_path):
    """Of 80 MB, the source takes nothing of its own, and the anchors as much as the model: 80 MB."""
    folders = [tmp_path / "safetensors", tmp_path / "bin"]
    for folder in folders:
        folder.mkdir()
        write(folder, {f"{i}.weight": torch.rand(625, 1000) for i in range(32)}, folder.name)
    done = python("-c", MEMORY, *folders)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[1:]:
        read, after = map(float, line.split())
        assert read < 20, line
        assert after < 100, line
