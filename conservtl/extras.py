"""Import of optional dependencies, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any

from conservtl.errors import MissingExtraError

__all__ = ["require"]

_TESTED = "torch 2.11.0, torchvision 0.26.0 and torchaudio 2.11.0 are compatible"


def require(module: str, extra: str) -> Any:
    """Import and return ``module``.

    Raises:
        MissingExtraError: the module is not installed, or cannot be loaded with the installed torch (binary packages
            of torch's family then raise OSError or RuntimeError).
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        hint = f" ({_TESTED})" if module.startswith("torch") else ""
        raise MissingExtraError(
            f"{module} is needed here and cannot be imported: {error}. "
            f"Install it with: pip install 'conservtl[{extra}]'{hint}"
        ) from error
