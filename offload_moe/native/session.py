"""The card in use: its memory, page locks and modules. Addresses are the card's unless they are called the host's."""

import ctypes
import weakref
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from offload_moe.errors import BudgetError, TransferError
from offload_moe.native.driver import Driver
from offload_moe.native.library import load_library
from offload_moe.native.structs import CardNodeStruct, SessionStruct
from offload_moe.system.sizes import format_size

GRAPH_ERROR = -1000  # of `om_card_graph` and passes: less the driver's code


def lost_card(reason: str) -> TransferError:
    """The error of a card whose every further call fails."""
    return TransferError(
        f"The card was lost: {reason}. It was reset, unplugged, or a kernel failed. "
        "End this program and start it again; where it happens again, use --device-pass off."
    )


class Session:
    """The primary context of the card, which torch uses too, with a stream of its own."""

    def __init__(self, driver: Driver, device: int = 0) -> None:
        """Open the card of this number. Raises: TransferError."""
        self.driver = driver
        self._struct = SessionStruct()
        self._library = load_library()
        self.address = ctypes.addressof(self._struct)
        driver.check(self._library.om_session_open(driver.address, device, self.address), "open the card")
        self._close = weakref.finalize(self, _close, self._struct, driver)
        self._close.atexit = False

    def close(self) -> None:
        """Give the context and the stream back; all that was allocated must have been freed."""
        self._close()

    def allocate(self, num_bytes: int) -> int:
        """Memory of the card. Raises: BudgetError."""
        address = ctypes.c_uint64()
        code = self._library.om_session_allocate(self.address, num_bytes, ctypes.byref(address))
        if code:
            raise BudgetError(f"The card refused {format_size(num_bytes)}: {self.driver.describe(code)}.")
        return address.value

    def free(self, address: int) -> None:
        self.driver.check(self._library.om_session_free(self.address, address), "free memory of the card")

    def lock(self, host: int, num_bytes: int) -> int:
        """Page-lock memory of the host for the card. Returns 0 or the driver's code."""
        return int(self._library.om_session_lock(self.address, host, num_bytes))

    def unlock(self, host: int) -> int:
        """The inverse. Returns 0 or the driver's code."""
        return int(self._library.om_session_unlock(self.address, host))

    def address_of(self, host: int) -> int:
        """The card's address of locked memory of the host; 0 where it has none."""
        address = ctypes.c_uint64()
        code = self._library.om_session_address_of(self.address, host, ctypes.byref(address))
        return 0 if code else address.value

    def upload(self, address: int, values: Any) -> None:
        """Copy a ctypes value or array behind all that was queued, and wait."""
        code = self._library.om_session_upload(self.address, address, ctypes.addressof(values), ctypes.sizeof(values))
        self.driver.check(code, "copy to the card")

    def download(self, address: int, values: Any) -> None:
        """The inverse."""
        code = self._library.om_session_download(self.address, ctypes.addressof(values), address, ctypes.sizeof(values))
        self.driver.check(code, "copy from the card")

    def load(self, image: bytes) -> "Module":
        """The kernels of an image. Raises: TransferError."""
        module = ctypes.c_void_p()
        code = self._library.om_session_load(self.address, image, ctypes.byref(module))
        self.driver.check(code, "load the kernels")
        assert module.value is not None
        return Module(self, module.value)

    def graph(self, nodes: "ctypes.Array[CardNodeStruct]") -> int:
        """An executable graph of these kernels. Raises: TransferError."""
        executable = ctypes.c_void_p()
        code = self._library.om_card_graph(self.address, ctypes.addressof(nodes), len(nodes), ctypes.byref(executable))
        self.check_graph(code, "make a graph of kernels")
        assert executable.value is not None
        return executable.value

    def free_graph(self, executable: int) -> None:
        self._library.om_card_graph_free(self.address, executable)

    def check_graph(self, result: int, what: str) -> None:
        """Check a result of `om_card_graph` or of a pass. Raises: TransferError."""
        if result <= GRAPH_ERROR:
            self._raise_if_lost(GRAPH_ERROR - result)
            self.driver.check(GRAPH_ERROR - result, what)

    def _raise_if_lost(self, code: int) -> None:
        if self._library.om_driver_is_lost(code):
            raise lost_card(self.driver.describe(code))

    def synchronize(self) -> None:
        """Wait for all work of the card, torch's included. Raises: TransferError."""
        code = self._library.om_session_synchronize(self.address)
        self._raise_if_lost(code)
        self.driver.check(code, "finish its work")


class SharedMemory:
    """Page-locked memory that host and card reach; it begins with zeros.

    host, address: where each of them sees it.
    """

    def __init__(self, session: Session, num_bytes: int) -> None:
        """Allocate so many bytes. Raises: BudgetError."""
        host, address = ctypes.c_void_p(), ctypes.c_uint64()
        code = load_library().om_session_allocate_shared(
            session.address, num_bytes, ctypes.byref(host), ctypes.byref(address)
        )
        if code or host.value is None:
            meaning = session.driver.describe(code)
            raise BudgetError(f"The driver refused {format_size(num_bytes)} of page-locked RAM: {meaning}.")
        self.host, self.address = host.value, address.value
        ctypes.memset(self.host, 0, num_bytes)
        self._num_bytes = num_bytes
        self._free = weakref.finalize(self, _free_shared, session, self.host)
        self._free.atexit = False

    def array(self, dtype: DTypeLike) -> NDArray[Any]:
        """The whole of it as the host's numbers, until it is closed."""
        return np.frombuffer(memoryview((ctypes.c_byte * self._num_bytes).from_address(self.host)), dtype=dtype)

    def close(self) -> None:
        """Free it; neither side may use it any more."""
        self._free()


class Module:
    """Loaded kernels."""

    def __init__(self, session: Session, handle: int) -> None:
        self._session, self._handle = session, handle
        self._unload = weakref.finalize(self, _unload, session, handle)
        self._unload.atexit = False

    def close(self) -> None:
        """Unload the kernels; no graph has them any more."""
        self._unload()

    def function(self, name: str) -> int:
        """The handle of a kernel. Raises: TransferError."""
        function = ctypes.c_void_p()
        code = load_library().om_session_function(
            self._session.address, self._handle, name.encode(), ctypes.byref(function)
        )
        self._session.driver.check(code, f"find the kernel {name}")
        assert function.value is not None
        return function.value


def _close(struct: SessionStruct, driver: Driver) -> None:
    if driver.address:
        load_library().om_session_close(ctypes.addressof(struct))


def _free_shared(session: Session, host: int) -> None:
    load_library().om_session_free_shared(session.address, host)


def _unload(session: Session, handle: int) -> None:
    load_library().om_session_unload(session.address, handle)
