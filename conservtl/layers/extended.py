"""Modules that compute otherwise than their class does, with the same name, parameters and buffers.

An extension is a class put over a module's own class, in place: the module keeps its identity, and with it every
reference, hook, tied parameter and optimizer that knows it. It survives copies and pickles of the model.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from conservtl.errors import SpecError
from conservtl.layers.names import canonical

__all__ = ["ExtendedModule", "extend_module", "extended_modules", "own_class", "restore_module"]


class ExtendedModule(nn.Module):
    """Base of a class that is put over a module's own.

    A subclass overrides ``forward``, in which ``super().forward`` is that of the module's own class. The names of its
    settings, plain attributes of the module, stand in ``settings``.
    """

    kind: ClassVar[str]
    """Kind of the plan's decision that extends modules so."""
    settings: ClassVar[tuple[str, ...]] = ()
    extension: ClassVar[type[ExtendedModule]]
    own_class: ClassVar[type[nn.Module]]

    def difference(self) -> str:
        """Return how a model with such modules differs from one without, in the plural: ``norms mix ...``."""
        raise NotImplementedError(f"{type(self).__name__} needs difference().")

    def remedy(self) -> str:
        """Return a sentence that tells how to adapt from a model that is extended so."""
        raise NotImplementedError(f"{type(self).__name__} needs remedy().")

    def extra_repr(self) -> str:
        """Settings beside those of the module's own class."""
        shown = [f"{name}={getattr(self, name)!r}" for name in self.settings]
        return ", ".join(text for text in (super().extra_repr(), *shown) if text)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return _blank, (self.extension, self.own_class), *reduced[2:]


def extend_module(module: nn.Module, extension: type[ExtendedModule], **settings: Any) -> None:
    """Put a class over a module's own, in place; with other settings if it is there already.

    Args:
        module: of any class.
        extension: a subclass of ``ExtendedModule``.
        settings: a value for each of the extension's ``settings``.

    Raises:
        SpecError: another extension is there.
    """
    if not isinstance(module, extension):
        if isinstance(module, ExtendedModule):
            raise SpecError(
                f"{module.own_class.__name__} is extended by {module.extension.__name__} and cannot be extended by "
                f"{extension.__name__} too. Leave one of the two strategies out."
            )
        module.__class__ = _combined(extension, type(module))
    vars(module).update(settings)


def restore_module(module: nn.Module) -> None:
    """Give a module its own class back; a module that is not extended stays as it is."""
    if isinstance(module, ExtendedModule):
        for name in module.settings:
            del vars(module)[name]
        own: Any = module.own_class
        module.__class__ = own


def extended_modules(model: nn.Module) -> dict[str, ExtendedModule]:
    """Canonical name of each extended module -> the module."""
    return {canonical(name): part for name, part in model.named_modules() if isinstance(part, ExtendedModule)}


def own_class(module: nn.Module) -> type[nn.Module]:
    """Class of a module without an extension."""
    return module.own_class if isinstance(module, ExtendedModule) else type(module)


def _combined(extension: type[ExtendedModule], own: type[nn.Module]) -> type[ExtendedModule]:
    """Return the extension over a class; always the same, so that compiled models need no new graph."""
    key = (extension, own)
    if key not in _COMBINED:
        # The module of the own class: torch.fx takes what torch.nn defines for a leaf, and must go on doing so.
        fields = {"extension": extension, "own_class": own, "__module__": own.__module__}
        _COMBINED[key] = type(f"{extension.__name__}{own.__name__}", (extension, own), fields)
    return _COMBINED[key]


_COMBINED: dict[tuple[type, type], type[ExtendedModule]] = {}


def _blank(extension: type[ExtendedModule], own: type[nn.Module]) -> nn.Module:
    """Return a module of the combined class without any state, for pickle and copy to fill."""
    cls = _combined(extension, own)
    return cls.__new__(cls)
