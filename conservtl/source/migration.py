"""A model's own hooks for loading old state dicts, run before names are matched."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.compat import has_load_hooks, hook_tables, with_metadata
from conservtl.layers import canonical
from conservtl.layers.copying import deep_copy
from conservtl.source.kinds import has_values

__all__ = ["Migration"]

_WEIGHT_NORM = re.compile(r"^(.*?)parametrizations\.(\w+)\.original([01])$")
"""Names of a weight norm that is a parametrization; ``nn.utils.weight_norm`` calls them ``weight_g``, ``weight_v``."""


class Migration:
    """A model's hooks for loading, on a copy of the model without its weights.

    ``load_state_dict`` lets each module change the dictionary before it is loaded: ``weight_norm`` and torchvision's
    detection models rename what earlier versions saved, and a user's hooks do whatever they like. Weights that are
    copied name by name must pass through the same hooks. Nothing of the model is changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        state = model.state_dict()
        self._names = {canonical(name): name for name in state}
        self._scalars = {
            canonical(name) for name, tensor in state.items() if isinstance(tensor, Tensor) and not tensor.ndim
        }
        self._hooked = any(has_load_hooks(module) for module in model.modules())
        self.notes: tuple[str, ...] = ()

    def run(self, tensors: Mapping[str, Tensor], versions: Mapping[str, dict[str, Any]]) -> dict[str, Tensor]:
        """Return the tensors as the model's hooks leave them, by canonical name.

        A hook that fails is one that the tensors are not meant for: they are then returned unchanged, with a note.
        """
        self.notes = ()
        tensors = {
            name: tensor[0] if name in self._scalars and tensor.shape == (1,) else tensor  # as saved before torch 0.4
            for name, tensor in self._old_weight_norm(tensors).items()
        }
        if not self._hooked:
            return tensors
        try:
            recorder = _LoadRecorder(_without_weights(self._model), self._names)
            recorder.load(tensors, versions)
        except Exception as error:  # noqa: BLE001 - a hook of any library or user
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.notes = (f"the model's own hooks for loading stopped ({reason}), so names are as in the source",)
            return tensors
        if changed := [name for name, value in recorder.found.items() if tensors.get(name) is not value]:
            self.notes = (f"the model's own hooks for loading made {changed[0]!r}{_more(len(changed) - 1)}",)
        return recorder.found

    def _old_weight_norm(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rename a parametrization's weight norm for a model that has the older hook; torch does the reverse only."""
        renamed = {}
        for name, tensor in tensors.items():
            if name not in self._names and (parts := _WEIGHT_NORM.match(name)):
                old = f"{parts[1]}{parts[2]}_{'gv'[int(parts[3])]}"
                renamed[old if old in self._names and old not in tensors else name] = tensor
            else:
                renamed[name] = tensor
        return renamed


class _LoadRecorder:
    """Notes what each module would load, and keeps it from loading."""

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        self.found: dict[str, Tensor] = {}
        self._model = model
        self._names = names
        self._given: dict[int, Tensor] = {}
        self._visited: set[str] = set()
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._prefixes = {f"{name}." if name else "" for name, _ in model.named_modules(remove_duplicate=False)}
        for module in model.modules():
            module.register_load_state_dict_pre_hook(self._record)  # type: ignore[no-untyped-call]

    def load(self, tensors: Mapping[str, Tensor], versions: Mapping[str, dict[str, Any]]) -> None:
        """Run the model's hooks on copies of the tensors; those that no hook changes are then found themselves.

        Raises:
            Exception: whatever a hook raises before all modules were reached.
        """
        copies = {name: tensor.clone() if has_values(tensor) else tensor for name, tensor in tensors.items()}
        self._given = {id(copies[name]): tensor for name, tensor in tensors.items()}
        state = {self._names.get(name, name): tensor for name, tensor in copies.items()}
        strict = inspect.signature(self._model.load_state_dict).parameters.get("strict")
        try:
            with torch.no_grad():
                self._model.load_state_dict(
                    with_metadata(state, {name: dict(fields) for name, fields in versions.items()}),
                    **({} if strict is None else {"strict": False}),
                )
        except Exception:
            if not self._prefixes <= self._visited:
                raise
        for name, tensor in tensors.items():  # a class with a method of its own for loading does not tell
            owner = self._names.get(name, name).rpartition(".")[0]
            if not self._visited or (f"{owner}." if owner else "") in self._prefixes - self._visited:
                self.found.setdefault(name, tensor)

    def _record(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Run as the module's last hook: take out what it would copy, and note what no module claims."""
        self._visited.add(prefix)
        local = {name for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)}
        local |= {name for name, _ in module.named_buffers(recurse=False, remove_duplicate=False)}
        for name in [name for name in state if name.startswith(prefix)]:
            rest = name[len(prefix) :]
            if f"{prefix}{rest.partition('.')[0]}." in self._prefixes and rest not in local:
                continue  # a child's
            value = state.pop(name) if rest in local else state[name]
            if isinstance(value, Tensor) and id(value) not in self._own:
                self.found[canonical(name)] = self._unchanged(value)

    def _unchanged(self, value: Tensor) -> Tensor:
        """Return the tensor that a value is a copy of, unless a hook has written into the copy."""
        given = self._given.get(id(value))
        unchanged = given is not None and (value is given or torch.equal(value, given))
        return given if given is not None and unchanged else value.detach()


def _more(count: int) -> str:
    return f" and {count} more tensors" if count > 1 else " and one more tensor" if count else ""


def _without_weights(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters hold no values, without hooks that loading does not need."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for module in model.modules():
        for table in hook_tables(module):
            memo[id(table)] = type(table)()
    return deep_copy(model, memo)
