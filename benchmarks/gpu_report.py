"""Results of ``gpu.py``, part by part: what fails is named, the rest measured, and a run that was cut off goes on."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_tables import TABLES

__all__ = ["LostDeviceError", "Report", "failed", "tried"]

_HOW = (
    "Medians with quartiles; ratios are formed within a round of both, between synchronisations, so that the time "
    "of the host counts. Made by `python benchmarks/gpu.py`."
)
_SAME = ("gpu", "versions", "date")


class LostDeviceError(RuntimeError):
    """An error after which a process can do nothing more on its GPU."""


def tried(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is measured, or ``{"failed": why}``.

    Raises:
        LostDeviceError: this process has lost its GPU.
    """
    gc.collect()
    try:
        return measure()
    except LostDeviceError:
        raise
    except Exception as error:
        traceback.print_exc()
        if "CUDA error" in str(error):  # such as an illegal address: every call after it fails too
            raise LostDeviceError(failed(error)) from error
        why = failed(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"failed": why}


def failed(error: Exception) -> str:
    """Return an error's class and first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Report:
    """What was measured, written after each part.

    Args:
        folder: of ``gpu.json`` and ``gpu.md``; None: nothing is written.
        machine: card, versions and date.
        triton: whether programs run.
        resume: whether to keep what the folder has, if it was measured on such a card, with these versions, today.
    """

    def __init__(self, folder: Path | None, machine: Mapping[str, Any], *, triton: bool, resume: bool = False) -> None:
        self._folder, self.machine, self._triton = folder, dict(machine), triton
        self.parts: dict[tuple[str, str], dict[str, Any]] = {}
        if folder is not None and resume and (file := folder / "gpu.json").exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            if all(before["machine"].get(key) == self.machine.get(key) for key in _SAME):
                self.parts = {(one["part"], one["model"]): one for one in before["parts"]}

    def left(self, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the parts that are not measured yet; those that failed last."""
        return sorted((one for one in wanted if _failures(self.parts.get(one))), key=self.parts.__contains__)

    def add(self, part: str, model: str, found: Mapping[str, Any]) -> None:
        """Print a part's table and write all."""
        self.parts[part, model] = {"part": part, "model": model, **found}
        print("\n".join(_table(self.parts[part, model])), flush=True)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        content = {"machine": self.machine, "triton": self._triton, "parts": list(self.parts.values())}
        (self._folder / "gpu.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (self._folder / "gpu.md").write_text(self._page(), encoding="utf-8")

    def failures(self) -> list[str]:
        """Return a line for each part and row that failed."""
        return [f"{' '.join(name)}{one}" for name, found in self.parts.items() for one in _failures(found)]

    def _page(self) -> str:
        place = self.machine
        versions = ", ".join(f"{package} {version}" for package, version in place["versions"].items())
        said = f"{place['gpu']}; {versions}; {place['date']}. Triton programs: {'yes' if self._triton else 'no'}."
        order = list(TABLES)
        parts = sorted(self.parts.values(), key=lambda one: order.index(one["part"]))
        lines = ["# On a GPU", "", said, "", _HOW, "", *(line for one in parts for line in _table(one))]
        if found := self.failures():
            lines += ["## Failed", "", *(f"- {one}" for one in found), ""]
        return "\n".join(lines)


def _failures(found: Mapping[str, Any] | None) -> list[str]:
    """Return what failed of a part: all of it, or rows."""
    if found is None or "failed" in found:
        return [": not measured" if found is None else f": {found['failed']}"]
    return [f", {name}: {row['failed']}" for name, row in found["rows"].items() if "failed" in row]


def _table(found: Mapping[str, Any]) -> list[str]:
    if "failed" in found:
        return []
    rows = {name: row for name, row in found["rows"].items() if "failed" not in row}
    return TABLES[found["part"]](found["model"], {**found, "rows": rows}) if rows else []
