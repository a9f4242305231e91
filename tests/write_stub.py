"""Write ``conservtl/__init__.pyi``: the public names, with the methods found at run time, for type checkers.

python tests/write_stub.py
"""

from pathlib import Path

import conservtl

STUB = Path(conservtl.__file__).with_suffix(".pyi")


def stub() -> str:
    """The stub of the package as it is imported now."""
    names = {
        name: (getattr(conservtl, name).__module__, getattr(conservtl, name).__name__) for name in conservtl.__all__
    }
    names |= {old: names[new] for old, new in conservtl._RENAMED.items()}
    imports = sorted(f"from {module} import {own} as {name}" for name, (module, own) in names.items())
    listed = [f'    "{name}",' for name in sorted(conservtl.__all__, key=_case_order)]
    head = "# Written by tests/write_stub.py. Do not edit."
    return "\n".join([head, *imports, "", "__version__: str", "__all__ = [", *listed, "]", ""])


def _case_order(name: str) -> tuple[bool, bool, str]:
    """Constants, classes and functions apart, as ruff sorts them."""
    return name.upper() != name, name[0].islower(), name


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
