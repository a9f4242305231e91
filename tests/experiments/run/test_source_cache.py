"""The cache of trained source models: one entry for each source, found without decoding its data."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from conservtl.data import Examples
from conservtl.engine.checkpoint import Checkpoints
from conservtl.experiments.run import source_cache, source_training
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import parse_spec, with_fields
from conservtl.tasks.fingerprint import digest_of_names


def key_of(spec):
    setting = prepare(spec)
    return source_training._key(setting, setting.domains.source_train)


def copied(root: Path, to: Path) -> Path:
    to.mkdir()
    for file in root.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_another_seed_is_another_source(untrained):
    spec = parse_spec(untrained)
    first = obtain_source(prepare(spec))
    second = obtain_source(prepare(with_fields(spec, {"seed": 1})))
    assert (first.origin, second.origin) == ("trained", "trained")
    assert any(not torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    again = obtain_source(prepare(with_fields(spec, {"seed": 1})))
    assert again.origin == "cached"
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.args", {"width": 2.0}),
        ("data.features.n_mels", 30),
        ("data.source_augment", None),
        ("data.source_speakers", ["anna"]),
        ("data.held_out_takes", [0]),
        ("source.training.lr", 1e-4),
    ],
)
def test_the_key_names_whatever_the_source_depends_on(speech_fields, field, value):
    spec = parse_spec(speech_fields)
    assert key_of(with_fields(spec, {field: value})) != key_of(spec)


def test_the_key_is_the_same_for_all_that_only_adapts(speech_fields):
    """Shots, strategies and training of the target share one source model; so do targets, where the source stays."""
    spec = with_fields(parse_spec(speech_fields), {"data.source_speakers": ["anna"]})
    others = {"data.shots": 1, "data.augment": None, "strategies": [], "training.lr": 1.0, "data.target": "ben"}
    assert {key_of(with_fields(spec, {name: value})) for name, value in others.items()} == {key_of(spec)}


def test_a_changed_file_makes_another_key(speech_fields, humming, tmp_path):
    """By its size, or by its time where the size stays; a file of the target changes nothing."""
    root = copied(humming, tmp_path / "copy")
    spec = with_fields(parse_spec(speech_fields), {"data.root": str(root)})
    before = key_of(spec)
    file = root / "0_anna_6.wav"
    os.utime(root / "0_cleo_6.wav", (1, 1))
    assert key_of(spec) == before
    os.utime(file, (1, 1))
    assert key_of(spec) != before
    file.unlink()
    assert key_of(spec) != before


def test_no_example_is_decoded_for_the_key(speech_fields):
    class Costly(Dataset):
        names = ("a", "b")
        labels = torch.tensor([0, 1])

        def __len__(self):
            return 2

        def __getitem__(self, _):
            raise AssertionError("decoded")

    setting = prepare(parse_spec(speech_fields))
    assert source_training._key(setting, Costly()) != source_training._key(setting, setting.domains.source_train)


def test_labels_that_are_equal_modulo_256_differ():
    data = Examples(torch.zeros(2, 1), torch.tensor([0, 1]), ("a", "b"))
    assert digest_of_names(data) != digest_of_names(replace(data, labels=torch.tensor([256, 1])))
    assert digest_of_names(data) != digest_of_names(replace(data, names=("b", "a")))


@pytest.mark.parametrize(("field", "value", "same"), [("target", [5, 6], True), ("source", [0, 1], False)])
def test_digits_share_a_source_over_targets(field, value, same):
    pytest.importorskip("sklearn")
    spec = parse_spec({"task": "vision", "data": {"kind": "digits"}})
    assert (key_of(with_fields(spec, {f"data.{field}": value})) == key_of(spec)) is same


def entries(spec):
    return sorted(spec.source.cache.glob("*.safetensors"))


def test_a_damaged_entry_is_trained_again(speech_fields, tmp_path):
    spec = with_fields(parse_spec(speech_fields), {"source.cache": str(tmp_path)})
    first = obtain_source(prepare(spec))
    (entry,) = entries(spec)
    content = bytearray(entry.read_bytes())
    content[-3] ^= 1
    entry.write_bytes(content)
    with pytest.warns(UserWarning, match="its checksum differs.* trained again"):
        again = obtain_source(prepare(spec))
    assert again.origin == "trained"
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True))
    assert obtain_source(prepare(spec)).origin == "cached"


def test_an_interrupted_training_goes_on_where_it_stopped(speech_fields, tmp_path, monkeypatch):
    """In its last epoch but one; the model equals that of an undisturbed training, and no checkpoint is left."""
    spec = with_fields(parse_spec(speech_fields), {"source.cache": str(tmp_path / "whole")})
    whole = obtain_source(prepare(spec))
    epochs, begun = spec.source.training.epochs, []
    write = Checkpoints.write_history

    def stopping(self, history):
        write(self, history)
        begun.append(len(history))
        if len(history) == epochs - 1 and len(begun) == epochs - 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "write_history", stopping)
    cut = with_fields(spec, {"source.cache": str(tmp_path / "cut")})
    with pytest.raises(KeyboardInterrupt):
        obtain_source(prepare(cut))
    resumed = obtain_source(prepare(cut))
    assert begun == [*range(1, epochs), epochs]
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    assert [path.suffix for path in (tmp_path / "cut").iterdir() if path.suffix != ".lock"] == [".safetensors"]


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path, monkeypatch):
    """Room for two models of 400 bytes with their headers; the second is not used again and goes."""
    monkeypatch.setattr(source_cache, "CACHE_BYTES", 1400)
    for time, name in enumerate(["first", "second"]):
        with source_cache.cache_entry(tmp_path, name) as entry:
            entry.store({"w": torch.full((100,), float(time))})
        os.utime(tmp_path / f"{name}.safetensors", (time, time))
    with source_cache.cache_entry(tmp_path, "first") as entry:
        assert entry.load() is not None
    with source_cache.cache_entry(tmp_path, "third") as entry:
        entry.store({"w": torch.zeros(100)})
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["first", "third"]


@pytest.mark.skipif(os.name == "nt", reason="permissions")
def test_only_its_user_may_read_a_cache_that_is_made(tmp_path):
    with source_cache.cache_entry(tmp_path / "cache", "model") as entry:
        assert entry.load() is None
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
