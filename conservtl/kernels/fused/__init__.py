"""Triton programs that act on all parameters of a device at once: one launch for each kind of work.

``programs.py`` holds the programs, ``launch.py`` launches them on ``Members`` (``members.py``), whose tables
(``table.py``) are built once and kept until a tensor moves. ``pull.py`` is the kernel of quadratic penalties,
``moves.py`` the work of updates. Imported only where ``backend.fused_on`` is true.
"""
