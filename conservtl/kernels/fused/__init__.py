"""Triton programs that act on all parameters of a device at once: one launch for each kind of work.

``programs/`` holds the programs, ``launch.py`` launches them (``calls.py``) on ``Members`` (``members.py``), whose
tables (``table.py``) are built once and kept until a tensor moves. Between a step's hook and a launch nothing runs once
for each tensor but lists of addresses; numbers that change from step to step are arguments of the launch
(``rates.py``). ``pull.py`` is the kernel of quadratic penalties, ``moves.py`` the work of updates. Imported only where
``backend.fused_on`` is true.
"""
