"""Small blocks, so that small tensors take several programs."""

from conservtl.kernels.fused import launch, members

for module in (launch, members):
    module.BLOCK = 64
    module.SPAN = 2
