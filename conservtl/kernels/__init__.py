"""Computations over many weights at once: penalties, deviations from the source, norms, sharded tensors.

``backend.py`` decides what acts on a device: on the CPU torch, in chunks of a cache's size (``pull.py``, ``chunks.py``,
``deviation.py``); on CUDA Triton programs that take all tensors in one launch (``fused/``), and where Triton is not
installed torch's operations on lists of all tensors, pulls from a CUDA graph (``replayed.py``).

- For penalties, a backend provides an object with the two methods of ``conservtl.plan.PenaltyKernel``:
  ``add_gradients(factor, scale)`` and ``move_weights(factor, skip)``. ``Penalty.kernels(moving)`` returns such objects
  for the parameters that are trained now. They are built once and reused until a tensor, its memory, the phase or the
  anchors change, so that they can keep pointers and buffers. ``gather`` in ``pull.py`` builds those of the quadratic
  penalties, for all devices; ``gradient.py`` holds the generic one. ``conservtl.testing.check_strategy`` compares
  kernels with the penalty's value.
- For updates, ``split`` in ``backend.py`` returns the parameters that programs act on, prepared once, and the rest, for
  which the functions of ``deviation.py`` serve: ``deviations``, ``norms``, ``totals`` and ``move_toward``.

A kernel never waits for the device: rates, loss scales and ``skip`` may be tensors there. Parameters may be sharded
(``dtensor.py``), their gradients missing, sparse or laid out in another memory format, and anchors in bf16 or on the
CPU.
"""
