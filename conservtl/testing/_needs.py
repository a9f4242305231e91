"""Says which extra is missing, before a bare ImportError can."""

from conservtl.extras import require

__all__: list[str] = []

require("hypothesis", "dev")
