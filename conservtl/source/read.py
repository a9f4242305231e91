"""Source weights: read without executing code, with their names matched to the model's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from conservtl.compat import metadata_of
from conservtl.errors import SourceError, SpecError, counted
from conservtl.layers import Layer, canonical, unwrap
from conservtl.source.entries import amount, some, tensors_of, weights_in
from conservtl.source.kinds import check_model_kinds, has_values
from conservtl.source.migration import Migration
from conservtl.source.placement import Placement, find_placement
from conservtl.source.references import reference_of
from conservtl.source.renaming import best_fit, check_unique, known_prefixes, names_after
from conservtl.source.run_header import read_header
from conservtl.source.shared import SharedModel
from conservtl.source.weight_files import load_weights

__all__ = ["Source", "SourceLike", "own_tensors", "read_source", "tensor_numbers"]


@dataclass(frozen=True)
class Source:
    """Source tensors by name.

    Args:
        tensors: name -> tensor.
        where: name of the source in messages.
        notes: entries that were unwrapped or ignored, and changes to names.
        module: the source model, if the source is a model.
        versions: of the modules that saved the tensors, as a state dict's metadata.
        old_names: name -> name in ``module``, if names were changed.
        run: the header of the run that saved the source, or None.
        shared: computes the source's function with the model to adapt itself, or None.
    """

    tensors: dict[str, Tensor]
    where: str
    notes: tuple[str, ...] = ()
    module: nn.Module | None = None
    versions: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    old_names: Mapping[str, str] = field(default_factory=dict)
    run: Mapping[str, Any] | None = None
    shared: SharedModel | None = None

    def renamed(self, prefix: str | None = None, rename: Mapping[str, str] | None = None) -> Source:
        """Return the source under other names."""
        if prefix is not None and not isinstance(prefix, str):
            raise SpecError(f"prefix must be a text; received {prefix!r:.60}. Write what the wanted names begin with.")
        if rename is not None and not isinstance(rename, Mapping):
            raise SpecError(f"rename must be {{expression: replacement}}; received {rename!r:.60}. Write a dictionary.")
        if not prefix and not rename:
            return self
        names = names_after(self.tensors, self.where, prefix, rename)
        notes = [*self.notes]
        versions = self.versions
        if prefix:
            notes.append(f"removed the prefix {prefix!r}{self._without(names)}")
            versions = self._versions(prefix.removesuffix(".") + ".")
        for expression, replacement in (rename or {}).items():
            notes.append(f"renamed {expression!r} to {replacement!r}")
            versions = {
                re.sub(expression, replacement, f"{name}.").removesuffix("."): v for name, v in versions.items()
            }
        return self._under(names, tuple(notes), versions)

    def matched(self, model: nn.Module | Mapping[str, Tensor]) -> Source:
        """Return the source under the model's names, as its hooks for loading migrate them.

        Wrappers' prefixes (``module.``, ``model.``) are removed. If most names are still none of the model's, the one
        prefix is removed, or put before them, under which nearly all fit with equal shapes: an encoder that was saved
        alone fits a submodule, a full model's encoder fits a bare one.

        Raises:
            SourceError: no name matches, names fit under two prefixes as well, or two names become one.
        """
        own = own_tensors(model)
        migration = Migration(unwrap(model)) if isinstance(model, nn.Module) else None
        candidates = []
        for prefix in known_prefixes(self.tensors):
            names = {name: name.removeprefix(prefix) for name in self.tensors}
            notes = [f"stripped the prefix {prefix!r}"] if prefix else []
            candidates.append((names, self._migrated(names, self._versions(prefix), notes, migration)))
        names, best = max(candidates, key=lambda one: len(one[1].tensors.keys() & own.keys()))
        fitting = sum(  # a nested tensor has no shape; it is refused later
            name in own and (tensor.is_nested or own[name].shape == tensor.shape)
            for name, tensor in best.tensors.items()
        )
        if 2 * fitting < min(len(self.tensors), len(own)):
            shaped = {name: tensor for name, tensor in self.tensors.items() if not tensor.is_nested}
            placement = find_placement(shaped, own, tensor_numbers(model), self.where)
            if placement is not None:
                return self._placed(placement, own, migration)
        if not best.tensors.keys() & own.keys():
            fit = best_fit(self.tensors, own)
            raise SourceError(
                f"{self.where}: its {counted(len(self.tensors), 'tensor')} must share names with the model; none "
                f"does, so nothing would be loaded. The source has {some(self.tensors)}; the model has {some(own)}. "
                + (
                    f"With {fit}, {len(fit.names)} of the model's {counted(len(own), 'tensor')} are found (in a spec, "
                    "source.prefix and source.rename)."
                    if fit
                    else "Rename the keys (rename={...}), or load the file into the model it was saved from and pass "
                    "that model."
                )
            )
        check_unique(names, self.where)
        return best

    def _placed(self, placement: Placement, own: Mapping[str, Tensor], migration: Migration | None) -> Source:
        """Return the source with its names under a prefix, as the model's hooks migrate."""
        plain = [name for name, tensor in self.tensors.items() if name in own and own[name].shape == tensor.shape]
        names = placement.names(self.tensors, plain)
        versions = self._versions(placement.strip)
        versions = {f"{placement.put}{name}".removesuffix("."): fields for name, fields in versions.items()}
        stripped = [f"stripped the prefix {placement.strip!r}{self._without(names)}"] if placement.strip else []
        put = [f"put the names under {placement.put!r}"] if placement.put else []
        return self._migrated(names, versions, [*stripped, *put], migration)

    def _migrated(
        self, names: Mapping[str, str], versions: Mapping[str, Any], notes: Sequence[str], migration: Migration | None
    ) -> Source:
        """Return the source under other names, as the model's hooks migrate them."""
        placed = self._under(names, (*self.notes, *notes), versions)
        if migration is None:
            return placed
        tensors = migration.run(placed.tensors, versions)
        before = {id(tensor): name for name, tensor in placed.tensors.items()}
        old = {}
        for name, tensor in tensors.items():
            former = name if placed.tensors.get(name) is tensor else before.get(id(tensor))
            if former is not None:
                old[name] = placed.old_names.get(former, former)
        return replace(placed, tensors=tensors, old_names=old, notes=(*placed.notes, *migration.notes))

    def _without(self, names: Collection[str]) -> str:
        """Return a remark on the tensors that are not among these names; empty if all are."""
        left = [name for name in self.tensors if name not in names]
        return f", left out {counted(len(left), 'tensor')} without it, {amount(left, self.tensors)}" if left else ""

    def _under(self, names: Mapping[str, str], notes: tuple[str, ...], versions: Mapping[str, Any]) -> Source:
        """Return the source with other names: old name -> new name."""
        old = {new: self.old_names.get(name, name) for name, new in names.items()}
        tensors = {new: self.tensors[name] for name, new in names.items()}
        return replace(self, tensors=tensors, notes=notes, versions=versions, old_names=old)

    def _versions(self, prefix: str) -> Mapping[str, dict[str, Any]]:
        return {f"{name}.".removeprefix(prefix).removesuffix("."): fields for name, fields in self.versions.items()}

    def as_model_has(self, resampled: Mapping[str, Tensor]) -> Source:
        """Return the source as a model of the target's names and image size needs it.

        A source model under other names, or for another image size, is replaced by its tensors.
        """
        same = all(old == new for new, old in self.old_names.items())
        return replace(
            self, tensors={**self.tensors, **resampled}, module=self.module if same and not resampled else None
        )

    def values_of(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Return parameter name -> source tensor; a tied parameter is found under any of its names."""
        values = {}
        for info in (info for layer in layers for info in layer.parameters):
            name = next((name for name in (info.name, *info.aliases) if name in self.tensors), None)
            if name is not None:
                values[info.name] = self.tensors[name]
        return values

    def check_finite(self, other_than: Collection[str] = ()) -> None:
        """Raise unless all values are finite, but those of ``other_than``: an attention mask is infinite by design."""
        for name, tensor in self.tensors.items():
            numbers = tensor.is_floating_point() or tensor.is_complex()
            if name in other_than or not numbers or not has_values(tensor):
                continue
            if not torch.isfinite(tensor).all():
                count = int((~torch.isfinite(tensor)).sum())
                raise SourceError(
                    f"{self.where}: values must be finite; tensor {name!r} holds {counted(count, 'value')} "
                    "that are NaN or "
                    "infinite. Save the source again from a run that did not diverge."
                )


class _Record(Protocol):
    """A dataclass, as timm's configurations and torchaudio's bundles are."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


SourceLike = str | Path | Mapping[str, Any] | nn.Module | Source | Enum | _Record
"""A path or a name of weights, a state dict (wrapped or not), a model, a library's own object for weights that it
publishes, or a source that was read before."""


def read_source(
    source: SourceLike,
    *,
    key: str | None = None,
    prefix: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> Source:
    """Read source weights without executing code from a file.

    A checkpoint may hold several dictionaries. Without ``key``, at each level: the entry ``state_dict``, or else
    ``model_state_dict``, ``model`` or ``module``; if there is none, the tensors themselves, or else the only entry
    that is a dictionary of tensors. Several others are an error that lists them.

    Args:
        source: a path (``.safetensors``, or ``.pt``, ``.pth``, ``.th``, ``.bin`` read with ``weights_only=True``; a
            folder as ``save_pretrained`` writes it, or its index), a state dict, a dictionary that wraps one, or a
            model. Or a name: ``"torchvision:ResNet18_Weights.DEFAULT"`` or the entry itself,
            ``"timm:resnet18.a1_in1k"`` or a model's ``pretrained_cfg``, ``"torchaudio:WAV2VEC2_BASE"`` or the bundle,
            ``"hf:ORG/NAME@REVISION"`` (safetensors only), or a URL with ``#sha256=...`` or a hash in the file's name,
            as torch publishes weights. A download is announced on stderr with its size.
        key: the entry of a checkpoint to take, such as ``"state_dict_ema"``; dots lead to nested entries.
        prefix: what the names of the wanted tensors begin with; removed. Other tensors are left out.
        rename: regular expression -> replacement, applied to the names in order, after ``prefix``.

    Raises:
        SourceError: the file is missing or unreadable, holds no tensors, has no such entry, or names do not match; or a
            download fails, and the message names the file and where to put it.
        MissingExtraError: a name needs a library that is not installed.
        SpecError: an expression is not valid.
    """
    return _read(source, key).renamed(prefix, rename)


def own_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return canonical name -> tensor of a model's state dict."""
    state = unwrap(model).state_dict() if isinstance(model, nn.Module) else model
    return {canonical(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def tensor_numbers(model: nn.Module | Mapping[str, Tensor]) -> dict[str, int]:
    """Return canonical name -> number of a model's tensor, the same for all names of a tied one."""
    state = unwrap(model).state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    return {canonical(name): id(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _read(source: SourceLike, key: str | None) -> Source:
    if (reference := reference_of(source)) is not None:
        pinned = reference.pinned()
        return replace(_read(pinned.read(), key), where=f"source {pinned}")
    if isinstance(source, (nn.Module, Source)):
        if key is not None:
            raise SourceError(f"key chooses an entry of a checkpoint; the source is none. Leave key={key!r} out.")
        if isinstance(source, Source):
            return source
        model = unwrap(source)
        check_model_kinds(model, "the source model")
        state = model.state_dict()
        where = f"source {type(model).__name__}"
        return Source(tensors_of(state, where, []), where, module=model, versions=metadata_of(state))
    if isinstance(source, Mapping):
        return _source_in(source, "source state dict", key)
    if isinstance(source, (str, Path)):
        path = Path(source)
        return replace(_source_in(load_weights(path), f"source {path.name}", key), run=read_header(path))
    raise SourceError(
        f"source must be a path, a state dict or a torch.nn.Module; received {type(source).__name__}. Names of "
        "published weights are texts, such as 'timm:resnet18.a1_in1k'."
    )


def _source_in(entries: Mapping[str, Any], where: str, key: str | None) -> Source:
    weights, notes = weights_in(entries, where, key)
    tensors = tensors_of(weights, where, notes)
    if averaged := tensors.keys() & {"n_averaged"}:  # torch.optim.swa_utils.AveragedModel
        tensors = {name: tensor for name, tensor in tensors.items() if name not in averaged}
    return Source(tensors, where, tuple(notes), versions=metadata_of(weights))
