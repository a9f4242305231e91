"""The licence of a source's weights, as the source states it, and its name on the Hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from conservtl.errors import ConservtlError
from conservtl.extras import require
from conservtl.source.references import is_name, reference_of

__all__ = ["UNKNOWN", "base_model", "front_matter", "licence_of"]

UNKNOWN = "unknown"
_PATIENCE = 5  # seconds for the Hub's card


def front_matter(card: Path) -> dict[str, Any]:
    """Return the metadata at the head of a card; empty if there is no card, or it is none that YAML can read."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        text = card.read_text(encoding="utf-8")
        if text.startswith("---\n") and "\n---" in text[4:]:
            read = yaml.safe_load(text[4 : text.index("\n---", 4)])
            return read if isinstance(read, dict) else {}
    return {}


def base_model(source: str) -> str | None:
    """Return the repository on the Hub that a name of weights means; None for paths and other names."""
    kind, colon, name = source.partition(":")
    if not colon or kind not in ("hf", "timm"):
        return None
    name = name.partition("@")[0].removeprefix("timm/")
    return f"timm/{name}" if kind == "timm" else name


def licence_of(source: str | Path) -> str:
    """Return the licence that the card of weights, the Hub, timm or torchvision states; ``unknown`` if none does."""
    found: Any = None
    with suppress(ConservtlError, OSError):
        if not is_name(str(source)):
            path = Path(source)
            found = front_matter((path if path.is_dir() else path.parent) / "README.md").get("license")
        else:
            found = _stated(reference_of(str(source)))
    return found if isinstance(found, str) and found.strip() else UNKNOWN


def _stated(reference: Any) -> Any:
    config = getattr(reference, "config", None)  # timm's
    if config is not None:
        return getattr(config, "license", None)
    meta = getattr(getattr(reference, "weights", None), "meta", None)  # torchvision's
    if isinstance(meta, dict):
        return meta.get("license")
    if str(reference).startswith("hf:"):
        hub = require("huggingface_hub", "hub")
        with suppress(Exception):  # of the network's library: a card that cannot be read states nothing
            options = {"revision": reference.revision, "etag_timeout": _PATIENCE}
            return front_matter(Path(hub.hf_hub_download(reference.name, "README.md", **options))).get("license")
    return None
