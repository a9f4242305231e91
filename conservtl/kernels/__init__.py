"""Computations over many weights at once: penalties, deviations from the source, norms, sharded tensors.

What another backend (fused kernels for GPUs, for example) has to provide:

- For penalties, an object with the two methods of ``conservtl.plan.PenaltyKernel``: ``add_gradients(factor, scale)``
  and ``move_weights(factor, skip)``. ``Penalty.kernels(moving)`` returns such objects for the parameters that are
  trained now. They are built once and reused until a tensor, its memory, the phase or the anchors change, so that they
  can keep pointers and buffers. ``gather`` in ``pull.py`` builds those of the quadratic penalties, for all devices;
  ``gradient.py`` holds the generic one. ``conservtl.testing.check_strategy`` compares kernels with the penalty's value.
- For updates, the functions of ``deviation.py``: ``deviations``, ``norms``, ``totals`` and ``move_toward``.

A kernel never waits for the device: rates, loss scales and ``skip`` may be tensors there. Parameters may be sharded
(``dtensor.py``), their gradients missing, sparse or laid out in another memory format, and anchors in bf16 or on the
CPU.
"""
