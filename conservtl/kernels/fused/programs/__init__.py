"""Triton programs over tables of pointers. Each handles one block of one tensor.

A table's row is a tensor: its columns hold addresses, its ``sizes`` numbers of elements. ``entries`` and ``starts``
hold, for each program, the row and the first element of its block. Blocks inside a tensor are read without a mask, in
words of 16 bytes if every address is ALIGNED; the last block of a tensor is masked. Rows are read in such words if
their length is EVEN, a multiple of 16, and the addresses are aligned. Arithmetic is in ACC: float32, or float64 if a
tensor is.
"""

from conservtl.kernels.fused.programs.masks import mix, unmix
from conservtl.kernels.fused.programs.pulls import add_pull, lerp, soften
from conservtl.kernels.fused.programs.reductions import decay_shares, range_sums, ratios, sums
from conservtl.kernels.fused.programs.rows import row_norms, shrink_rows

__all__ = [
    "add_pull",
    "decay_shares",
    "lerp",
    "mix",
    "range_sums",
    "ratios",
    "row_norms",
    "shrink_rows",
    "soften",
    "sums",
    "unmix",
]
