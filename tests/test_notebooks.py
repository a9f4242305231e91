"""The example notebooks run from the first cell to the last, and hold no outputs."""

import re
from pathlib import Path

import pytest

import conservtl

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
NEEDS = {"new_speaker": "espeakng_loader", "corrupted_images": "sklearn"}

nbformat = pytest.importorskip("nbformat")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_no_outputs(path):
    """Outputs in the repository would be of an older version than the code beside them."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch):
    client = pytest.importorskip("nbclient")
    for needed in ("ipykernel", "matplotlib", "scipy", NEEDS[path.stem]):
        pytest.importorskip(needed)
    monkeypatch.setenv("PYTHONPATH", str(Path(conservtl.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # as many settings and cells, fewer epochs
        cell.source = re.sub(r"epochs=\d+", "epochs=2", cell.source)
    client.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [
        output.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    assert sum("text/html" in data for data in shown) >= 4
    comparison = next(data["text/html"] for data in shown if "In numbers" in data.get("text/html", ""))
    assert "source as it is" in comparison
    assert "<svg" in comparison
