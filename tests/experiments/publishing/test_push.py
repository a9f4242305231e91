"""Only weights, configuration and card leave the machine."""

import pytest
from torch import nn

import conservtl as ctl
from conservtl.experiments.publishing.push import push

hub = pytest.importorskip("huggingface_hub")


class Api:
    """Records calls in the place of the Hub's client."""

    calls: list

    def create_repo(self, repository, **options):
        self.calls.append((repository, options))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **options):
        self.calls.append(options)


@pytest.fixture
def folder(tmp_path):
    adaptation = ctl.adapt(nn.Linear(3, 2), nn.Linear(3, 2))
    saved = ctl.save(adaptation, tmp_path / "out", ["/yes", "no"], metrics={"after": {"target": {"f1": 1.0}}})
    for name in ("checkpoint.pt", "spec.yaml", "recording.wav"):
        (saved / name).write_text("private")
    return saved


@pytest.mark.parametrize("public", [False, True])
def test_it_sends_what_is_meant_to_be_published(folder, monkeypatch, public):
    monkeypatch.setattr(Api, "calls", [], raising=False)
    monkeypatch.setattr(hub, "HfApi", Api)
    upload = push(folder, "me/words", public=public)
    (repository, options), sent = Api.calls
    assert (repository, options) == ("me/words", {"private": not public, "exist_ok": True})
    assert sent["allow_patterns"] == ["README.md", "model.safetensors"]
    assert (sent["repo_id"], sent["folder_path"]) == ("me/words", folder)
    assert upload.address == "https://huggingface.co/me/words"


def test_a_dry_run_sends_nothing(folder, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", None)
    upload = push(folder, "me/words", dry_run=True)
    assert upload.files["README.md"] == (folder / "README.md").stat().st_size
    assert str(upload).endswith("would go to me/words")


def test_without_a_network_one_line(folder, monkeypatch):
    class Broken(Api):
        def create_repo(self, *_, **__):
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "HfApi", Broken)
    with pytest.raises(ctl.SourceError, match=r"^me/words cannot be written to \(ConnectionError: no route\)") as found:
        push(folder, "me/words")
    assert "\n" not in str(found.value)


def test_refusals(folder, tmp_path):
    with pytest.raises(ctl.SpecError, match="ORG/NAME"):
        push(folder, "words")
    with pytest.raises(ctl.SpecError, match=r"must hold model\.safetensors"):
        push(tmp_path, "me/words")
    adaptation = ctl.adapt(nn.Linear(3, 2), nn.Linear(3, 2))
    saved = ctl.save(adaptation, tmp_path / "other", metadata={"data": {"root": "/home/me/data"}})
    with pytest.raises(ctl.SpecError, match=r"header\.metadata\.data\.root must name no folder .* '/home/me/data'"):
        push(saved, "me/words")
