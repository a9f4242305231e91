"""Without the library of an integration, its module names the extra that installs it, and nothing else misses it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("module", "library", "extra"), [("lightning", "lightning.pytorch", "lightning")])
def test_the_extra_is_named(module, library, extra):
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "import conservtl, conservtl.integrations\n"
        f"try:\n    import conservtl.integrations.{module}\n"
        "except conservtl.MissingExtraError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert f"{library} is needed here" in found.stdout
    assert f"conservtl[{extra}]" in found.stdout
