"""Checkpoints of any layout are mixed tensor by tensor; references are computed by hand in float64."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import conservtl as ctl
from conservtl.source.read import read_source
from conservtl.storage.tensor_files import load_tensors, read_header, save_tensors
from conservtl.weights import merge_rules

NAMES = {"embed.weight": (5, 3), "layers.0.weight": (3, 3), "layers.0.bias": (3,), "head.weight": (5, 3)}


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in NAMES.items()}
    return made | {"steps": torch.tensor(seed)}


def sharded(folder, tensors, ending="safetensors"):
    folder.mkdir()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    files = {name: f"{stem}-0000{1 + place % 2}-of-00002.{ending}" for place, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        (save_file if ending == "safetensors" else torch.save)(part, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for name in ("config.json", "tokenizer.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"")
    return folder


def wide(states, name):
    return [one[name].double() for one in states]


def ties(start, ends, t, density):
    changes = torch.stack([end - start for end in ends])
    kept = torch.zeros_like(changes)
    for place, change in enumerate(changes):
        keep = max(1, round(density * change.numel()))
        least = change.abs().flatten().sort(descending=True).values[keep - 1]
        kept[place] = torch.where(change.abs() >= least, change, 0)
    sign = kept.sum(0).sign()
    total, count = torch.zeros_like(start), torch.zeros_like(start)
    for change in kept:
        agree = (change * sign) > 0
        total, count = total + change * agree, count + agree
    return start + t * total / count.clamp(min=1)


def stock(start, ends):
    one, other = ((end - start).flatten() for end in ends)
    cosine = max(0.0, float(one @ other / one.norm() / other.norm()))
    t = 2 * cosine / (1 + cosine)
    return (1 - t) * start + t * (ends[0] + ends[1]) / 2


REFERENCES = {
    "interpolate": lambda start, ends: 0.7 * start + 0.3 * (ends[0] + ends[1]) / 2,
    "wise_ft": lambda start, ends: 0.7 * start + 0.3 * (ends[0] + ends[1]) / 2,
    "soup": lambda _, ends: (ends[0] + ends[1]) / 2,
    "task_arithmetic": lambda start, ends: start + 0.3 * (ends[0] - start + ends[1] - start),
    "ties": lambda start, ends: ties(start, ends, 0.3, 0.4),
    "model_stock": stock,
}


@pytest.mark.parametrize("method", REFERENCES)
def test_each_method_by_hand(tmp_path, method):
    states = [state(0), state(1), state(2)]
    given = {} if method in ("soup", "model_stock") else {"t": 0.3}
    out = tmp_path / "out.safetensors"
    report = ctl.merge(states[0], states[1:], out, method=method, density=0.4, **given)
    found = load_file(out)
    for name in NAMES:
        start, *ends = wide(states, name)
        torch.testing.assert_close(found[name].double(), REFERENCES[method](start, ends), rtol=1e-6, atol=1e-6)
    assert found["steps"] == 1
    assert report.taken == ("steps",)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shards_keep_files_types_and_configuration(tmp_path, ending, dtype):
    source, model = state(0), state(1, dtype)
    folder = sharded(tmp_path / "a", model, ending)
    ctl.merge(sharded(tmp_path / "s", source), folder, tmp_path / "out", t=0.25)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert made == {*shards, "model.safetensors.index.json", "config.json", "tokenizer.json"}
    found = read_source(tmp_path / "out").tensors
    for name in NAMES:
        expected = (0.75 * source[name].double() + 0.25 * model[name].double()).to(dtype)
        torch.testing.assert_close(found[name], expected)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in model.values())
    with safe_open(tmp_path / "out/model-00001-of-00002.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["merge"])["t"] == 0.25
        assert str(tmp_path) not in str(file.metadata())


def test_ends_are_exact_and_masks_stay_infinite(tmp_path):
    source, model = state(0), state(1)
    for one in (source, model):
        one["mask"] = torch.tensor([0.0, -torch.inf])
    for t, end in ((0.0, source), (1.0, model), (0.5, None)):
        ctl.merge(source, model, tmp_path / f"{t}.safetensors", t=t)
        found = load_file(tmp_path / f"{t}.safetensors")
        assert torch.equal(found["mask"], source["mask"])
        assert end is None or all(torch.equal(found[name], end[name]) for name in NAMES)


def test_prefixes_of_wrappers_are_matched_and_dropped(tmp_path):
    source, model = state(0), state(1)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.items()}}, tmp_path / "a.pt")
    save_file({f"_orig_mod.{name}": value for name, value in source.items()}, tmp_path / "s.safetensors")
    ctl.merge(tmp_path / "s.safetensors", tmp_path / "a.pt", tmp_path / "out.safetensors", t=1)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == model.keys()
    assert all(torch.equal(found[name], model[name]) for name in model)


def test_a_trainers_prefix_is_dropped_and_what_is_beside_the_model_named(tmp_path):
    source, model = state(0), state(1)
    trained = {f"model.{name}": value for name, value in model.items()} | {"criterion.weight": torch.ones(2)}
    torch.save({"state_dict": trained, "epoch": 1}, tmp_path / "a.ckpt")
    with pytest.raises(ctl.SourceError, match=r"'criterion.weight' of source a.ckpt is not in .*'criterion.weight'\]"):
        ctl.merge(source, tmp_path / "a.ckpt", tmp_path / "out.safetensors", t=1)
    said = ctl.merge(source, tmp_path / "a.ckpt", tmp_path / "out.safetensors", t=1, fresh=["criterion.weight"])
    assert "source a.ckpt: took the entry 'state_dict', ignored epoch" in str(said)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == model.keys() | {"criterion.weight"}
    assert all(torch.equal(found[name], model[name]) for name in model)


def test_the_entry_that_is_mixed_is_said_and_chosen(tmp_path):
    source, model, ema = state(0), state(1), state(2)
    torch.save({"model": model, "ema": ema}, tmp_path / "a.pt")
    for key, end in ((None, model), ("ema", ema)):
        said = ctl.merge(source, tmp_path / "a.pt", tmp_path / f"{key}.safetensors", t=1, key=key)
        assert f"source a.pt: took the entry {key or 'model'!r}" in str(said)
        assert torch.equal(load_file(tmp_path / f"{key}.safetensors")["head.weight"], end["head.weight"])
    with pytest.raises(ctl.SourceError, match="key must name an entry of a checkpoint; received 'emma'"):
        ctl.merge(source, tmp_path / "a.pt", tmp_path / "out.safetensors", t=1, key="emma")


@pytest.mark.parametrize(
    ("extra", "advice"),
    [
        (["head.a", "tail.b"], r"keep the first model's: fresh=\['head.a', 'tail.b'\]"),
        ([f"tail.{number}.w" for number in range(6)], r"keep the first model's: fresh=\['tail\.\*'\]"),
        ([f"w{number}" for number in range(6)], r"Merge models of one structure\.$"),
    ],
)
def test_advice_for_tensors_of_one_model_names_them_all(tmp_path, extra, advice):
    model = change(**{name: torch.ones(2) for name in extra})
    with pytest.raises(ctl.SourceError, match=advice):
        ctl.merge(state(0), model, tmp_path / "out.safetensors", t=1)


@pytest.mark.parametrize("whole", ["source", "model"])
@pytest.mark.parametrize("by", ["storage", "value"])
def test_tied_tensors_under_one_name_or_two(tmp_path, whole, by):
    source, model = state(0), state(1)
    both = {"source": source, "model": model}
    for name, one in both.items():
        one["head.weight"] = one["embed.weight"] if by == "storage" else one["embed.weight"].clone()
        if name != whole:
            del one["head.weight"]
    for name, one in both.items():
        torch.save(one, tmp_path / f"{name}.pt")
    ctl.merge(tmp_path / "source.pt", tmp_path / "model.pt", tmp_path / "out.safetensors", t=0.5)
    found = load_file(tmp_path / "out.safetensors")
    expected = (source["embed.weight"].double() + model["embed.weight"].double()) / 2
    assert found.keys() == model.keys()
    for name in found.keys() & {"embed.weight", "head.weight"}:
        torch.testing.assert_close(found[name].double(), expected)
        assert torch.equal(found[name], found["embed.weight"])


def test_header_of_a_run_is_kept_with_a_new_checksum(tmp_path):
    header = {"task": "t", "labels": ["a", "b"], "model": {}, "preprocessing": {}}
    for name, seed in (("s", 0), ("a", 1)):
        save_tensors(state(seed), tmp_path / f"{name}.safetensors", header)
    ctl.merge(tmp_path / "s.safetensors", tmp_path / "a.safetensors", tmp_path / "out", t=0.5)
    assert read_header(tmp_path / "out/model.safetensors") == header
    load_tensors(tmp_path / "out/model.safetensors")  # compares the checksum
    save_tensors(state(0), tmp_path / "s.safetensors", header | {"labels": ["b", "a"]})
    with pytest.raises(ctl.SourceError, match="same labels"):
        ctl.merge(tmp_path / "s.safetensors", tmp_path / "a.safetensors", tmp_path / "o.safetensors", t=0.5)


def change(**values):
    made = state(1)
    for name, value in values.items():
        made[name] = value
    return made


WITHOUT = {name: value for name, value in state(1).items() if name != "head.weight"}


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([WITHOUT], {"t": 1}, "'head.weight' of source state dict is not in"),
        ([state(1), WITHOUT], {"t": 1}, "'head.weight' of source state dict is not in"),
        ([change(extra=torch.ones(2, 2))], {"t": 1}, "'extra' of source state dict"),
        ([change(**{"head.weight": torch.ones(4, 3)})], {"t": 1}, r"'head.weight' has \(4, 3\).* and \(5, 3\)"),
        ([state(1)], {}, "t must say"),
        ([state(1)], {"t": 1.5}, "between 0 .* and 1 for interpolate; received 1.5"),
        ([state(1)], {"t": float("nan")}, "received nan"),
        ([state(1)], {"method": "soup"}, "at least 2"),
        ([state(1), state(2)], {"method": "soup", "t": 0.5}, "soup chooses it"),
        ([state(1)], {"t": 1, "method": "tise"}, "Did you mean 'ties'"),
        ([state(1)], {"t": 1, "density": 0}, "density must be"),
        ([state(1)], {"t": 1, "batch_norm": "x"}, "batch_norm must be"),
        ([state(1)], {"t": 1, "fresh": ["heat"]}, "'heat': must match"),
        ([state(1)], {"t": "0.5"}, "t must be between .* received '0.5'"),
        ([state(1)], {"t": True}, "t must be between .* received True"),
        ([state(1)], {"t": 1, "density": "x"}, "density must be .* received 'x'"),
        ([state(1)], {"t": 1, "density": float("nan")}, "density must be .* received nan"),
        ([state(1)], {"t": 1, "method": None}, "method must be one of .*received None"),
        ([state(1)], {"t": 1, "method": ["ties"]}, "method must be one of .*received"),
        ([state(1)], {"t": 1, "fresh": "heat"}, "'heat': must match"),
        ([state(1)], {"t": 1, "fresh": [3]}, "fresh must be a list of globs, all texts; received"),
        ([], {"t": 1}, "a model beside the source"),
        ([change(table=torch.ones(2, 2, dtype=torch.int8))], {"t": 1, "q": 1}, "before quantisation"),
    ],
)
def test_refusals(tmp_path, models, options, message):
    source = state(0)
    if options.pop("q", 0):
        source["table"] = torch.zeros(2, 2, dtype=torch.int8)
    with pytest.raises((ctl.SourceError, ctl.SpecError), match=message):
        ctl.merge(source, models, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_floats_of_8_bits_have_no_mean(tmp_path):
    """Equal ones are kept; of others the first model's are kept only if the caller says so."""
    low = torch.float8_e4m3fn
    source, model = state(0) | {"q": torch.ones(2, 2).to(low)}, state(1) | {"q": torch.ones(2, 2).to(low)}
    ctl.merge(source, model, tmp_path / "same.safetensors", t=0.5)
    assert load_file(tmp_path / "same.safetensors")["q"].float().tolist() == [[1, 1], [1, 1]]
    model["q"] = torch.full((2, 2), 2.0).to(low)
    with pytest.raises(ctl.SourceError, match=r"'q' holds torch.float8_e4m3fn and differs .*fresh=\['q'\]"):
        ctl.merge(source, model, tmp_path / "other.safetensors", t=0.5)
    report = ctl.merge(source, model, tmp_path / "other.safetensors", t=0.5, fresh=["q"])
    assert load_file(tmp_path / "other.safetensors")["q"].float().tolist() == [[2, 2], [2, 2]]
    assert report.taken == ("q", "steps")


def test_integers_that_differ_are_kept_if_the_caller_says_so(tmp_path):
    source, model = state(0) | {"table": torch.zeros(2, 2).long()}, change(table=torch.ones(2, 2).long())
    ctl.merge(source, model, tmp_path / "out.safetensors", t=0.5, fresh=["table"])
    assert load_file(tmp_path / "out.safetensors")["table"].tolist() == [[1, 1], [1, 1]]


def test_a_head_of_the_models_own(tmp_path):
    model = change(**{"head.weight": torch.ones(2, 3)})
    report = ctl.merge(state(0), model, tmp_path / "out.safetensors", t=0.5, fresh=["head"])
    assert torch.equal(load_file(tmp_path / "out.safetensors")["head.weight"], model["head.weight"])
    assert report.taken == ("head.weight", "steps")


def test_an_error_about_the_content_of_a_file_is_not_one_of_the_file(tmp_path):
    save_file(change(**{"head.weight": torch.ones(4, 3)}), tmp_path / "a.safetensors")
    with pytest.raises(ctl.SourceError, match=r"^all checkpoints must have one shape .*\(--fresh\)\.$"):
        ctl.merge(state(0), tmp_path / "a.safetensors", tmp_path / "out", t=0.5)


def test_overflow_is_named(tmp_path):
    source, model = ({"w": torch.full((2,), value, dtype=torch.float16)} for value in (-6e4, 6e4))
    with pytest.raises(ctl.SourceError, match=r"'w' must fit into torch\.float16"):
        ctl.merge(source, model, tmp_path / "out.safetensors", t=1.5, method="task_arithmetic")


def test_nothing_is_overwritten_unasked(tmp_path):
    out = tmp_path / "out"
    ctl.merge(state(0), state(1), out, t=0)
    with pytest.raises(ctl.SpecError, match="empty or new"):
        ctl.merge(state(0), state(1), out, t=1)
    ctl.merge(state(0), state(1), out, t=1, overwrite=True)
    assert torch.equal(read_source(out).tensors["head.weight"], state(1)["head.weight"])
    for name in ("model.pt", "one.safetensors"):
        ctl.merge(state(0), state(1), tmp_path / "one.safetensors", t=0, overwrite=True)
        with pytest.raises(ctl.SpecError, match=r"must be a folder or end in|exists\. Give another name"):
            ctl.merge(state(0), state(1), tmp_path / name, t=1)
    (tmp_path / "one.safetensors").unlink()
    (out / "thesis.docx").write_text("")
    with pytest.raises(ctl.SpecError, match=r"holds thesis.docx too"):
        ctl.merge(state(0), state(1), out, t=1, overwrite=True)
    with pytest.raises(ctl.SpecError, match="none of the checkpoints"):
        ctl.merge(out, state(1), out, t=1, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("out", [None, 3])
def test_the_result_needs_a_path(out):
    with pytest.raises(ctl.SpecError, match="out must be the path of a file"):
        ctl.merge(state(0), state(1), out, t=0.5)


@pytest.mark.parametrize(("batch_norm", "t"), [("source", 0.0), ("adapted", 1.0), ("interpolate", 0.25)])
def test_running_statistics_of_an_end(tmp_path, batch_norm, t):
    start, end = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 1.0])
    source, model = ({"norm.running_mean": one, "w": one} for one in (start, end))
    ctl.merge(source, model, tmp_path / "out.safetensors", t=0.25, batch_norm=batch_norm)
    found = load_file(tmp_path / "out.safetensors")
    assert found["norm.running_mean"].tolist() == (start + t * (end - start)).tolist()
    assert found["w"].tolist() == [2.0, 2.5]


@pytest.mark.parametrize(("density", "kept"), [(0.5, [0.0, -4.0, 3.0, 0.0]), (1.0, [1.0, -4.0, 3.0, 2.0])])
def test_the_largest_changes(density, kept):
    assert merge_rules._largest(torch.tensor([1.0, -4.0, 3.0, 2.0]), density).tolist() == kept


@pytest.mark.parametrize(
    ("one", "other", "cosine"), [([1, 0], [1, 1], 0.5**0.5), ([0, 0], [1, 0], 0.0), ([0, 0], [0, 0], 1.0)]
)
def test_the_angle_between_changes(one, other, cosine):
    found = merge_rules._cosine(*(torch.tensor(each, dtype=torch.float64) for each in (one, other)))
    assert found == pytest.approx(cosine)


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """Three checkpoints of 96 MiB in 8 MiB tensors: far less than one of them is in memory."""
    code = f"""
import resource, torch, conservtl as ctl
from safetensors.torch import save_file
from pathlib import Path
def rss():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
for name in "sab":
    save_file({{f"w{{i}}": torch.randn(2**21) for i in range(12)}}, r"{tmp_path}/" + name + ".safetensors")
ctl.merge({{"w": torch.ones(9)}}, {{"w": torch.ones(9)}}, r"{tmp_path}/small.safetensors", t=0.5)
before, most = rss(), 0
import conservtl.weights.merge as m
check = m._check_finite
def watch(*args):
    global most
    most = max(most, rss() - before)
    check(*args)
m._check_finite = watch
ctl.merge(r"{tmp_path}/s.safetensors", [r"{tmp_path}/a.safetensors", r"{tmp_path}/b.safetensors"],
          r"{tmp_path}/out.safetensors", t=0.5)
print(most)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    # With a threshold of its own the allocator returns each freed tensor at once: what is resident is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert 8 < float(done.stdout.split()[-1]) < 48
