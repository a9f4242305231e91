"""A history as TensorBoard reads it back."""

import math

import pytest

from conservtl import extras
from conservtl.errors import MissingExtraError
from conservtl.report import write_tensorboard

HISTORY = [
    {"epoch": 1, "phase": "head", "loss": 1.5, "lr": 1e-3, "target": {"accuracy": 0.5}, "source": None},
    {"epoch": 2, "phase": "all", "loss": math.nan, "valid": {"target": {"accuracy": 0.75}}},
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_number_is_a_scalar_over_epochs(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_tensorboard(HISTORY, tmp_path / "logs")
    found = EventAccumulator(str(tmp_path / "logs"))
    found.Reload()
    scalars = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert scalars == {
        "loss": [(1, 1.5)],
        "lr": [(1, pytest.approx(1e-3))],
        "target/accuracy": [(1, 0.5)],
        "valid/target/accuracy": [(2, 0.75)],
    }


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match="tensorboard"):
        write_tensorboard(HISTORY, tmp_path)
