"""The driver API for tests that drive the fake card without native code: each call raises where its code is not 0."""

import ctypes
from typing import Any

from support.cuda import shim
from support.cuda.fake import FakeDriver

MAPPED = 3  # and portable


class DriverError(RuntimeError):
    """A call's code."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: {code}")
        self.code = code


class KernelNode(ctypes.Structure):
    """`om_kernel_node`."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        *((name, ctypes.c_void_p) for name in ("params", "extra", "kernel", "context")),
    )


class Params:
    """A kernel's struct, and the array of one pointer by which the driver gets it."""

    def __init__(self, **fields: Any) -> None:
        kinds = {int: ctypes.c_void_p, float: ctypes.c_float, ctypes.c_int: ctypes.c_int}
        types = [(name, kinds[type(value)]) for name, value in fields.items()]
        self.struct = type("Struct", (ctypes.Structure,), {"_fields_": types})(*fields.values())
        self.array = (ctypes.c_void_p * 1)(ctypes.addressof(self.struct))


class Card:
    """The fake card with a current context, its allocations and streams."""

    def __init__(self, fake: FakeDriver) -> None:
        self.fake = fake
        self.context = self.made("cuDevicePrimaryCtxRetain", 0)
        self.call("cuCtxSetCurrent", self.context)
        self.module: int | None = None

    def call(self, name: str, *arguments: Any) -> None:
        words = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments]
        if code := getattr(self.fake.library, name)(*words):
            raise DriverError(name, code)

    def made(self, name: str, *arguments: Any) -> int:
        """What a call writes to its first parameter."""
        result = ctypes.c_uint64()
        self.call(name, ctypes.byref(result), *arguments)
        return result.value

    def floats(self, values: list[float]) -> int:
        """Page-locked memory of the host that the card reaches."""
        at = self.made("cuMemHostAlloc", 4 * len(values), MAPPED)
        ctypes.memmove(at, (ctypes.c_float * len(values))(*values), 4 * len(values))
        self.fake.host(at, 4 * len(values), 1)
        return at

    def read(self, at: int, count: int) -> list[float]:
        self.fake.host(at, 4 * count, 0)
        return list((ctypes.c_float * count).from_address(at))

    def alloc(self, count: int) -> int:
        return self.made("cuMemAlloc_v2", 4 * count)

    def stream(self) -> int:
        return self.made("cuStreamCreate", 1)

    def kernel(self, name: str) -> int:
        if self.module is None:
            path = shim.build((shim.SHIM / "probe.cu").read_text(), mode="race")
            self.module = self.made("cuModuleLoadData", ctypes.create_string_buffer(f"OMFAKE:{path}".encode()))
        return self.made("cuModuleGetFunction", self.module, name.encode())

    def launch(self, stream: int, name: str, params: Params, *, blocks: int = 1, threads: int = 64) -> None:
        dims = [ctypes.c_uint(n) for n in (blocks, 1, 1, threads, 1, 1, 0)]
        self.call("cuLaunchKernel", self.kernel(name), *dims, stream, params.array, None)

    def add(self, stream: int, source: int, to: int, value: float, *, count: int = 64) -> None:
        params = Params(**{"from": source, "to": to}, value=value, count=ctypes.c_int(count))
        self.launch(stream, "om_add", params, blocks=(count + 63) // 64)

    def node(self, name: str, params: Params, *, blocks: int = 1, threads: int = 64) -> KernelNode:
        three = ctypes.c_uint * 3
        array = ctypes.addressof(params.array)
        return KernelNode(self.kernel(name), three(blocks, 1, 1), three(threads, 1, 1), 0, array, None, None, None)

    def add_node(self, graph: int, source: int, to: int, value: float, after: list[int] | None = None) -> int:
        params = Params(**{"from": source, "to": to}, value=value, count=ctypes.c_int(64))
        after = after or []
        handles = (ctypes.c_void_p * len(after))(*after)
        node = self.node("om_add", params)
        return self.made("cuGraphAddKernelNode_v2", graph, handles, len(after), ctypes.byref(node))

    def instantiate(self, graph: int) -> int:
        return self.made("cuGraphInstantiateWithFlags", graph, 0)
