"""Extension of modules: another computation with the same name, parameters and buffers.

An extension replaces a module's class by a subclass, in place. The module keeps its identity, so references, hooks,
tied parameters and optimizers stay valid. Extensions are kept in copies and pickles of the model.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from conservtl.errors import SpecError
from conservtl.layers.names import canonical

__all__ = ["ExtendedModule", "extend_module", "extended_modules", "own_class", "restore_module"]


class ExtendedModule(nn.Module):
    """Base of extensions.

    A subclass overrides ``forward``, in which ``super().forward`` is that of the module's original class. ``settings``
    lists the names of its settings, which are plain attributes of the module.
    """

    kind: ClassVar[str]
    """Kind of the plan's decision that applies this extension."""
    settings: ClassVar[tuple[str, ...]] = ()
    extension: ClassVar[type[ExtendedModule]]
    own_class: ClassVar[type[nn.Module]]

    @classmethod
    def members(cls, original: type[nn.Module]) -> dict[str, Any]:  # noqa: ARG003
        """Return attributes of the combined class that depend on the original class; by default none."""
        return {}

    def difference(self) -> str:
        """Return how a model with such modules differs from one without, in the plural: ``norms mix ...``."""
        raise NotImplementedError(f"{type(self).__name__} needs difference().")

    def remedy(self) -> str:
        """Return a sentence that says how to adapt from a model with such modules."""
        raise NotImplementedError(f"{type(self).__name__} needs remedy().")

    def plain(self) -> nn.Module:
        """Return a module of torch alone that computes the same in eval mode; called on a copy of the model."""
        raise NotImplementedError(f"{type(self).__name__} needs plain().")

    def extra_repr(self) -> str:
        """Return the settings of the original class and of the extension."""
        shown = [f"{name}={getattr(self, name)!r}" for name in self.settings]
        return ", ".join(text for text in (super().extra_repr(), *shown) if text)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (self.extension, self.own_class), *reduced[2:]


def extend_module(module: nn.Module, extension: type[ExtendedModule], **settings: Any) -> None:
    """Extend a module in place, or change the settings of its extension.

    Raises:
        SpecError: the module has another extension.
    """
    if not isinstance(module, extension):
        if isinstance(module, ExtendedModule):
            raise SpecError(
                f"{module.own_class.__name__} is extended by {module.extension.__name__} and cannot be extended by "
                f"{extension.__name__} too. Remove one of the two strategies."
            )
        module.__class__ = _combined(extension, type(module))
    vars(module).update(settings)


def restore_module(module: nn.Module) -> None:
    """Remove a module's extension; a module without one stays unchanged."""
    if isinstance(module, ExtendedModule):
        for name in module.settings:
            del vars(module)[name]
        original: Any = module.own_class
        module.__class__ = original


def extended_modules(model: nn.Module) -> dict[str, ExtendedModule]:
    """Return canonical name -> module for all extended modules."""
    return {canonical(name): part for name, part in model.named_modules() if isinstance(part, ExtendedModule)}


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the original class of an extended one."""
    return module.own_class if isinstance(module, ExtendedModule) else type(module)


def _combined(extension: type[ExtendedModule], original: type[nn.Module]) -> type[ExtendedModule]:
    """Return the extension of a class; always the same object, so that compiled models need no new graph."""
    key = (extension, original)
    if key not in _COMBINED:
        # The __module__ of the original class: torch.fx treats classes of torch.nn as leaves.
        fields = {"extension": extension, "own_class": original, "__module__": original.__module__}
        fields |= extension.members(original)
        _COMBINED[key] = type(f"{extension.__name__}{original.__name__}", (extension, original), fields)
    return _COMBINED[key]


_COMBINED: dict[tuple[type, type], type[ExtendedModule]] = {}


def _blank(extension: type[ExtendedModule], original: type[nn.Module]) -> nn.Module:
    """Return an empty module of the combined class, whose state pickle and copy then set."""
    cls = _combined(extension, original)
    return cls.__new__(cls)
