"""A browser shows names from outside as text: nothing in them runs, and a page asks for nothing."""

from __future__ import annotations

import http.server
import importlib.util
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from conservtl.report import write_compare, write_html, write_tune

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")]


@pytest.fixture(scope="module")
def asked():
    """Address of a server -> the paths that were asked for."""
    paths = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", paths
        server.shutdown()


def evil_names(address):
    ran = "document.documentElement.setAttribute('ran', 1)"
    return (
        f"<script>{ran}</script>",
        f"</svg><img src='{address}/image' onerror=\"{ran}\">",
        f"\"><iframe src='{address}/frame'></iframe>",
        f"--></style><link rel=stylesheet href='{address}/style'><!--",
        f"</summary></pre><svg onload=\"{ran}\"><image href='{address}/vector'/></svg>",
    )


def opened(page, folder):
    """Return a page as the browser has it once all of it is loaded."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command = [BROWSER, *options, "--virtual-time-budget=3000", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def pages(folder, names):
    """Write the pages of a run, a comparison and a search with names from outside, and put them into one."""
    path = Path(__file__).parents[1] / "report" / "conftest.py"
    definition = importlib.util.spec_from_file_location("report_results", path)
    studies = importlib.util.module_from_spec(definition)
    definition.loader.exec_module(studies)
    values = [0.1] * len(names)
    classes = {"labels": list(names), "before": values, "after": values, "counts": [5] * len(names)}
    skipped = {"count": len(names), "files": [{"file": name, "reason": name} for name in names]}
    report = {
        "target": names[0],
        "shots": 5,
        "example": names[1],
        "classes": True,
        "before": {"target": {"accuracy": 0.2}, "source": {"accuracy": 0.9}},
        "after": {"target": {"accuracy": 0.8}, "source": {"accuracy": 0.8}},
        "per_class": {"target": classes, "source": classes},
        "drift": dict.fromkeys(names, 0.1),
        "environment": dict.fromkeys(names, names[0]),
        "spec": dict.fromkeys(names, names[0]),
        "skipped": skipped,
    }
    write_html(report, [], folder / "run.html")
    own = dict.fromkeys(names, (0.96, 0.98))
    comparison = studies.a_comparison(own=own, targets=names) | {"left_out": [names[2]], "skipped": skipped}
    write_compare(comparison, folder / "compare.html")
    write_tune(studies.a_search(fields={name: {"choices": list(names)} for name in names}), folder / "tune.html")
    return [folder / f"{name}.html" for name in ("run", "compare", "tune")]


@pytest.mark.parametrize("number", range(3))
def test_a_browser_runs_and_loads_nothing(tmp_path, asked, number):
    address, paths = asked
    page = pages(tmp_path, evil_names(address))[number]
    before = len(paths)
    shown = opened(page, tmp_path)
    assert "&lt;script&gt;document" in shown
    assert " ran=" not in shown.split(">", 2)[1]
    assert paths[before:] == []


def test_the_browser_would_have_run_them(tmp_path, asked):
    """The same names without escapes run and load: the test above can fail."""
    address, paths = asked
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><html><body>{''.join(evil_names(address))}</body></html>")
    assert ' ran="1"' in opened(tmp_path / "page.html", tmp_path).split(">", 2)[1]
    assert {"/image", "/frame", "/style"} <= set(paths)
