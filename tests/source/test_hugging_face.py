"""Weights from the Hugging Face Hub: a server on this machine answers as the Hub does, to the Hub's own library."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import conservtl as ctl
from conservtl.source.companions import companions
from conservtl.source.read import read_source
from conservtl.source.references import reference_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
hub = pytest.importorskip("huggingface_hub")


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.fixture
def state():
    return {name: torch.rand(tensor.shape) for name, tensor in network().state_dict().items()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that the Hub's library keeps files in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def kept(cache, files, commit=COMMIT, ref="main", name="org/net"):
    """Lay files out as the Hub's library keeps them."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file, content in files.items():
        (snapshot / file).write_bytes(content)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    return snapshot


def sharded(state, folder):
    """Return the files of ``save_pretrained`` for a state dict, in two shards."""
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    files = {}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
        files[file] = (folder / file).read_bytes()
    places = {name: file for file, part in parts.items() for name in part}
    files["model.safetensors.index.json"] = json_of({"metadata": {}, "weight_map": places})
    return files


def json_of(content):
    return json.dumps(content).encode()


def single(state, folder):
    save_file(state, folder / "saved")
    return {"model.safetensors": (folder / "saved").read_bytes()}


@pytest.fixture
def server(cache, monkeypatch):
    """A Hub with the files that a test puts into it: file -> content, at one commit."""
    files, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            asked.append(f"{self.command} {self.path}")
            found = re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(.+)", self.path)
            known = found and found[1] == "org/net"
            if known and found[2] not in ("main", "v1", COMMIT):
                known, code = None, "RevisionNotFound"
            else:
                code = "EntryNotFound" if known else "RepoNotFound"
            content = files.get(found[3]) if known else None
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if body and content:
                self.wfile.write(content)

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield files, asked
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.mark.parametrize("files_of", [single, sharded])
def test_weights_are_downloaded_once_and_announced(server, cache, state, tmp_path, capsys, files_of):
    files, asked = server
    files.update(files_of(state, tmp_path))
    adaptation = ctl.adapt(network(), "hf:org/net@main")
    assert all(torch.equal(adaptation.model.state_dict()[name], tensor) for name, tensor in state.items())
    told = capsys.readouterr().err.splitlines()
    size = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    place = cache / "models--org--net" / "snapshots" / COMMIT
    shown = f"{size} bytes" if size < 1000 else f"{size / 1000:.1f} kB"
    assert told[-1] == f"conservtl: downloading hf:org/net@{COMMIT} ({shown}) to {place}"
    asked.clear()
    assert read_source(f"hf:org/net@{COMMIT}").tensors.keys() == state.keys()
    assert asked == []
    assert capsys.readouterr().err == ""


def test_a_branch_is_pinned_to_its_commit_now(server, cache, state, tmp_path):
    """The cache holds an earlier commit of the branch."""
    files, _ = server
    files.update(single(state, tmp_path))
    kept(cache, {"model.safetensors": b"old"}, commit="f" * 40)
    assert str(reference_of("hf:org/net@main").pinned()) == f"hf:org/net@{COMMIT}"
    assert read_source("hf:org/net@main").where == f"source hf:org/net@{COMMIT}"


@pytest.mark.parametrize("files_of", [single, sharded])
@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_without_a_network_the_cache_serves(offline, state, tmp_path, revision, files_of):
    kept(offline, files_of(state, tmp_path))
    source = read_source(f"hf:org/net@{revision}")
    assert source.where == f"source hf:org/net@{COMMIT}"
    assert all(torch.equal(source.tensors[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("revision", "place"), [("main", "in a folder, and give the"), (COMMIT, "at {cache}/models--org")]
)
def test_without_a_network_one_line_names_the_file_and_its_place(offline, revision, place):
    with pytest.raises(ctl.SourceError) as error:
        read_source(f"hf:org/net@{revision}")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(
        f"source hf:org/net@{revision}: model.safetensors of org/net cannot be downloaded (Offline"
    )
    assert place.format(cache=offline) in message


def test_a_server_that_cannot_be_reached_is_asked_once(cache, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(ctl.SourceError, match=r"cannot be downloaded \(ConnectError: .*Download it on another machine"):
        read_source(f"hf:org/net@{COMMIT}")
    assert capsys.readouterr().err == ""


def test_a_shard_that_is_missing(offline, state, tmp_path):
    files = sharded(state, tmp_path)
    files.pop("model-00002-of-00002.safetensors")
    kept(offline, files)
    with pytest.raises(ctl.SourceError, match=r"model-00002-of-00002\.safetensors of org/net cannot be downloaded"):
        read_source("hf:org/net@main")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:org/net", r"'hf:org/net' must name a revision.*Write hf:org/net@main"),
        ("hf:net", r"'hf:net' must name a revision"),
        ("hf:org/net@", r"must have the form hf:ORG/NAME@REVISION"),
        ("hf:org/net@a@b", r"must have the form"),
        ("hf:", r"must have the form"),
        ("hf:../net@main", "Repo id must use alphanumeric chars"),
        ("hf:org/net@../../secret", "must have the form"),
    ],
)
def test_a_text_without_a_revision(offline, text, message):
    with pytest.raises(ctl.SourceError, match=message):
        read_source(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:org/nought@main", "there is no repository 'org/nought' that you may read"),
        ("hf:org/net@v2", "org/net has no revision 'v2'"),
        ("hf:org/net@v1", r"must hold model\.safetensors or model\.safetensors\.index\.json at v1.*Only safetensors"),
    ],
)
def test_the_server_does_not_have_it(server, text, message):
    files, _ = server
    files["pytorch_model.bin"] = b"pickled"
    with pytest.raises(ctl.SourceError, match=message):
        read_source(text)


def test_timm_reads_from_the_hub(server, cache, monkeypatch, tmp_path, capsys):
    from dataclasses import replace

    timm = pytest.importorskip("timm")
    files, _ = server
    files.update(single({**timm.create_model("test_resnet", num_classes=3).state_dict()}, tmp_path))
    config = replace(timm.get_pretrained_cfg("test_resnet"), hf_hub_id="org/net", url="", num_classes=3)
    source = read_source(config)
    assert len(source.tensors["fc.weight"]) == 3
    place = cache / "models--org--net" / "snapshots" / COMMIT
    assert f"conservtl: downloading timm:test_resnet.r160_in1k (1.5 MB) to {place}" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(read_source(config).tensors["fc.weight"], source.tensors["fc.weight"])


def test_files_beside_weights_are_downloaded_if_they_are_there(server):
    files, asked = server
    files.update({"vocab.json": b"{}", "merges.txt": b"#"})
    names = ("vocab.json", "tokenizer.json", "merges.txt")
    found = companions("hf:org/net@main", names)
    assert {name: path.read_bytes() for name, path in found.items()} == {"vocab.json": b"{}", "merges.txt": b"#"}
    before = len(asked)
    assert companions(f"hf:org/net@{COMMIT}", ("vocab.json", "merges.txt")) == found
    assert asked[before:] == []


def test_files_beside_weights_are_found_without_a_network(offline):
    kept(offline, {"vocab.json": b"{}", "model.safetensors": b"", "config.json": b"{}"})
    assert set(companions("hf:org/net@main", ("vocab.json", "merges.txt"))) == {"vocab.json"}


def test_files_beside_weights_in_a_folder(tmp_path):
    for name in ("model.safetensors", "vocab.json", "other.pt"):
        (tmp_path / name).write_text("{}")
    beside = {"vocab.json": tmp_path / "vocab.json"}
    assert companions(tmp_path, ("vocab.json", "merges.txt")) == beside
    assert companions(tmp_path / "model.safetensors", ("vocab.json",)) == beside
    assert companions(tmp_path / "other.pt", ("vocab.json",)) == {}
    assert companions("torchaudio:WAV2VEC2_BASE", ("vocab.json",)) == {}
