"""Without the library of an integration, its module names the extra that installs it."""

import importlib
import sys

import pytest

import conservtl as ctl


@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [
        ("lightning", "lightning.pytorch", "lightning"),
        ("transformers", "transformers", "transformers"),
        ("peft", "peft", "peft"),
    ],
)
def test_the_extra_is_named(monkeypatch, module, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)  # Lightning's other name
    for name in [name for name in sys.modules if name.startswith(f"conservtl.integrations.{module}")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ctl.MissingExtraError, match=rf"{library} is needed here .*conservtl\[{extra}\]"):
        importlib.import_module(f"conservtl.integrations.{module}")
