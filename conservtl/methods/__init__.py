"""The methods, one file or folder each: strategy, decision and formula together.

Every module here without a leading underscore is imported, and each strategy in it registers itself by its ``kind``;
no list names them. So does a strategy of a user's own when its class is defined:

Example:
    >>> from typing import Literal
    >>> import conservtl as ctl
    >>> class HoldFirst(ctl.Strategy):
    ...     kind: Literal["hold_first"] = "hold_first"
    ...     def apply(self, plan):
    ...         return plan.choose(self.label, "frozen", {plan.rows[0].name: {"frozen": True}})
    >>> as_strategy({"kind": "hold_first"})
    HoldFirst(kind='hold_first')
"""

from conservtl.methods.base import Order, Strategy
from conservtl.methods.composition import apply_all, extend_all, record_all, retract_all, void_notes
from conservtl.methods.registry import AnyStrategy, as_strategies, as_strategy, builtin_strategies, import_builtin

__all__ = [
    "AnyStrategy",
    "Order",
    "Strategy",
    "apply_all",
    "as_strategies",
    "as_strategy",
    "builtin_strategies",
    "extend_all",
    "record_all",
    "retract_all",
    "void_notes",
]

import_builtin()
