"""Small blocks, so that small tensors take several programs, in the process in which programs are interpreted."""

import os

from conservtl.kernels.fused import launch, members, stream

if os.environ.get("TRITON_INTERPRET"):  # every run of the tests imports this file
    for module in (launch, members, stream):
        module.BLOCK = 64
        module.SPAN = 2
