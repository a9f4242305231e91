"""What the examples promise: short scripts over the import API, and READMEs that name what is there."""

import ast
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for folder in ("speech", "vision") for path in (EXAMPLES / folder).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_at_most_80_lines_and_a_loop_by_hand(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 80
    assert {"backward", "step"} <= {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("folder", ["extend", "speech", "vision"])
def test_a_readme_names_every_file_beside_it(folder):
    text = (EXAMPLES / folder / "README.md").read_text()
    assert all(
        path.name in text for path in (EXAMPLES / folder).iterdir() if path.name not in ("README.md", "__pycache__")
    )


def test_the_speech_script_adapts_to_a_folders_speaker(python, humming):
    done = python(EXAMPLES / "speech" / "adapt_speaker.py", humming, "cleo")
    assert done.returncode == 0, done.stderr
    assert "after:  target" in done.stdout
    assert "frozen" in done.stdout


def test_the_recognizer_adapts_with_its_outputs_conserved(python, humming):
    """Too few steps to hear a word: it runs, and says what became of both domains."""
    pytest.importorskip("torchaudio")
    done = python(EXAMPLES / "speech" / "transcribe_speaker.py", humming, "cleo", 10)
    assert done.returncode == 0, done.stderr
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names == ["before", "plain", "outputs conserved"]
    assert done.stdout.count("% of words wrong") == 6
