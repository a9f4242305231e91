"""A GPU that Triton compiles for and that launches nothing: programs, arguments and hints are compared instead."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

BITS = {"i32": 31, "i64": 63, "u64": 64}
NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
NAMES |= {torch.int32: "*i32", torch.int64: "*i64"}


class Launch(NamedTuple):
    """A launch of a compiled program."""

    source: Any
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class OnGPU:
    """A tensor of the CPU that says to be on a GPU."""

    def __init__(self, tensor, device):
        self.device, self.dtype, self.data_ptr = device, tensor.dtype, tensor.data_ptr


class Driver:
    """Triton's driver of a GPU whose launches are checked against what was compiled, and noted.

    Args:
        arch: compute capability times 10.
        number: of the device, one that no machine has.
    """

    def __init__(self, arch, number):
        self.arch, self.device, self.stream, self.launches = arch, torch.device("cuda", number), 1234, []
        self.utils, self.launcher_cls = self, self._launcher

    def get_current_device(self):
        return self.device.index

    def get_current_stream(self, device):
        assert device == self.device.index
        return self.stream

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, _):
        return {"max_shared_mem": 163 * 1024}  # of an A100

    def load_binary(self, name, binary, shared, device):
        assert binary
        return None, 77, 32, 0, 1024

    def _launcher(self, source, metadata):
        from triton.backends.nvidia.driver import make_launcher

        make_launcher(source.constants, source.signature, None)  # it knows all types

        def launch(x, y, z, stream, function, packed, said, entering, leaving, *arguments):
            assert function == 77
            check(source, arguments)
            self.launches.append(Launch(source, (x, y, z), stream, arguments))

        return launch


def check(source, arguments):
    """Raise as Triton's launcher does unless arguments are those of a compiled program, with the hints it relies on."""
    if len(arguments) != len(source.signature):
        raise TypeError(f"function takes exactly {len(source.signature)} arguments ({len(arguments)} given)")
    for place, (kind, argument) in enumerate(zip(source.signature.values(), arguments, strict=True)):
        even = any("divisibility" in str(hint) for hint in source.attrs.get((place,), ()))
        if kind == "constexpr":
            assert source.constants[(place,)] == argument
        elif kind[0] == "*":
            assert NAMES[argument.dtype] == kind
            assert not even or argument.data_ptr() % 16 == 0
        elif kind in BITS:
            assert -(1 << BITS[kind]) <= argument < 1 << BITS[kind]
            assert not even or argument % 16 == 0
        else:
            assert kind == "fp32"
            assert isinstance(argument, float)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Compile for a GPU of an architecture that is not there, and launch by ``calls.call`` as if it were."""
    triton = pytest.importorskip("triton")
    from conservtl.kernels.fused import calls, launch, programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calls, "_compiled", {})
    found = [getattr(programs, name) for name in programs.__all__]

    def make(arch, number=97):
        driver = Driver(arch, number)
        triton.runtime.driver.set_active(driver)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: number)

        def on_gpu(program, grid, tensors, numbers, constants):
            calls.call(program, grid, [OnGPU(one, driver.device) for one in tensors], numbers, constants)

        monkeypatch.setattr(launch, "call", on_gpu)
        return driver

    yield make
    triton.runtime.driver.reset_active() if torch.cuda.is_available() else triton.runtime.driver.set_active(None)
    for program in found:
        program.device_caches.clear()
