"""Only weights, configuration and card leave the machine."""

import base64
import json
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from torch import nn

import conservtl as ctl
from conservtl.experiments.publishing.licence import _stated
from conservtl.experiments.publishing.push import _texts, push

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


@pytest.fixture
def server(monkeypatch):
    """A Hub on this machine that takes a repository and a commit: the requests that it was sent, and its answers."""
    asked, answers = {}, {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Transfer-Encoding") == "chunked":
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                content = self.rfile.read(length)
            path = self.path.partition("?")[0]
            asked[path] = content
            code, body = answers.get(path, (200, {}))
            body = body(content) if callable(body) else body
            sent = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "none")
    answers["/api/repos/create"] = 200, {"url": f"{endpoint}/me/words"}
    answers["/api/models/me/words/preupload/main"] = (
        200,
        lambda content: {
            "files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
        },
    )
    answers["/api/models/me/words/commit/main"] = (
        200,
        {"commitUrl": f"{endpoint}/me/words/commit/abc", "commitOid": "abc", "hookOutput": ""},
    )
    yield asked, answers
    running.shutdown()
    running.server_close()
    thread.join()


def test_the_hubs_own_client_sends_the_files(folder, server):
    """Of the commit that arrives: card and weights, byte by byte, and nothing else of the folder."""
    asked, _ = server
    upload = push(folder, "me/words")
    assert upload.address.endswith("/me/words")
    made = json.loads(asked["/api/repos/create"])
    assert (made["name"], made["organization"]) == ("words", "me")
    assert made.get("private") is True or made.get("visibility") == "private"
    lines = [json.loads(line) for line in asked["/api/models/me/words/commit/main"].splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert files == {name: (folder / name).read_bytes() for name in ("README.md", "model.safetensors")}


@pytest.mark.parametrize("code", [401, 403, 409])
def test_a_refusal_of_the_hub_is_one_line(folder, server, code):
    _, answers = server
    answers["/api/models/me/words/commit/main"] = code, {"error": "you may not\nwrite here"}
    with pytest.raises(ctl.SourceError, match=r"^me/words cannot be written to \(.*hf auth login\.$") as found:
        push(folder, "me/words")
    assert "\n" not in str(found.value)


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
    (folder / "README.md").rename(tmp_path / "card.md")
    (folder / "README.md").symlink_to(tmp_path / "card.md")
    with pytest.raises(ctl.SpecError, match=r"'README\.md' must be a file; it is a link"):
        push(folder, "me/words")


def test_texts_are_found_in_lists_and_dictionaries_but_for_labels():
    header = {"labels": ["/yes"], "run": {"files": ["a", {"labels": ["/b"]}], "steps": 3, "note": None}}
    assert list(_texts(header, "header")) == [("header.run.files", "a"), ("header.run.files.labels", "/b")]


@pytest.mark.parametrize(
    ("reference", "licence"),
    [
        (types.SimpleNamespace(config=types.SimpleNamespace(license="apache-2.0")), "apache-2.0"),
        (types.SimpleNamespace(weights=types.SimpleNamespace(meta={"license": "bsd"})), "bsd"),
        (types.SimpleNamespace(weights=types.SimpleNamespace(meta={})), None),
        (types.SimpleNamespace(), None),
    ],
)
def test_licences_that_libraries_state(reference, licence):
    assert _stated(reference) == licence
