"""Names of PEFT that this integration reads: a version that changed one is named, before anything is computed."""

from __future__ import annotations

from functools import reduce
from typing import Any

from conservtl.errors import MissingExtraError
from conservtl.extras import require

__all__ = ["BASE_LAYER", "LORA_ATTENTION", "LORA_LAYER", "PEFT_MODEL", "SAVED_MODULES", "check_lora", "check_model"]

_PEFT: Any = require("peft", "peft")
_MODEL = ("peft_config", "active_adapters", "disable_adapter")
_LORA = (
    "active_adapters",
    "get_base_layer",
    "lora_A",
    "lora_B",
    "lora_bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_variant",
    "scaling",
)


def _refused(what: str) -> MissingExtraError:
    return MissingExtraError(
        f"peft {getattr(_PEFT, '__version__', '')} has no {what}, which conservtl reads: its names have changed. "
        "Install a version that has it: pip install 'conservtl[peft]' 'peft<=0.21'"
    )


def _class(path: str) -> Any:
    try:
        return reduce(getattr, path.split("."), _PEFT)
    except AttributeError as error:
        raise _refused(f"peft.{path}") from error


PEFT_MODEL = _class("PeftModel")
BASE_LAYER = _class("tuners.tuners_utils.BaseTunerLayer")
LORA_LAYER = _class("tuners.lora.LoraLayer")
SAVED_MODULES = _class("utils.other.ModulesToSaveWrapper")
LORA_ATTENTION = _class("tuners.lora.layer.MultiheadAttention")


def check_model(model: Any) -> None:
    """Raise unless a PeftModel has the names that are read."""
    _check(model, _MODEL, "PeftModel")


def check_lora(layer: Any) -> None:
    """Raise unless a LoRA module has the names that are read, its parameters among them."""
    _check(layer, _LORA, type(layer).__name__)


def _check(found: Any, names: tuple[str, ...], owner: str) -> None:
    if missing := next((name for name in names if not hasattr(found, name)), None):
        raise _refused(f"{owner}.{missing}")
