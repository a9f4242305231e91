"""The methods, one file or folder each: strategy, decision and formula together.

Every module here without a leading underscore is imported, and each strategy in it registers itself by its ``kind``;
no list names them.
"""

from conservtl.methods.base import Order, Strategy
from conservtl.methods.composition import apply_all, extend_all, retract_all
from conservtl.methods.registry import AnyStrategy, as_strategy, builtin_strategies, import_builtin

__all__ = [
    "AnyStrategy",
    "Order",
    "Strategy",
    "apply_all",
    "as_strategy",
    "builtin_strategies",
    "extend_all",
    "retract_all",
]

import_builtin()
