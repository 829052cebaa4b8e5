"""NVIDIA's driver, as the native library loads it, and what it says of a card."""

import ctypes
from types import TracebackType
from typing import Self

from offload_moe.errors import DevicePassUnavailable, TransferError
from offload_moe.native.library import load_library
from offload_moe.native.structs import CardStruct

_TEXT_BYTES = 512


class Driver:
    """The driver's table of functions for native code: `address`."""

    def __init__(self, path: str | None = None) -> None:
        """Load the system's driver, or the library at this path. Raises: DevicePassUnavailable with the reason."""
        reason = ctypes.create_string_buffer(_TEXT_BYTES)
        address = load_library().om_driver_open(path.encode() if path else None, reason, _TEXT_BYTES)
        if not address:
            raise DevicePassUnavailable(_text(reason))
        self.address: int = address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the table: native code must no longer use it."""
        load_library().om_driver_close(self.address)
        self.address = 0

    def card(self, number: int = 0) -> CardStruct:
        """One of the machine's cards, by CUDA's number. Raises: TransferError."""
        found = CardStruct()
        self.check(
            load_library().om_card_describe(self.address, number, ctypes.byref(found)), f"describe card {number}"
        )
        return found

    def check(self, code: int, what: str) -> None:
        """Check one of the driver's codes. Raises: TransferError with its name where it is not 0."""
        if code:
            raise TransferError(f"The driver could not {what}: {self.describe(code)}.")

    def describe(self, code: int) -> str:
        """The name, the number and the meaning of one of the driver's codes."""
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        load_library().om_driver_describe(self.address, code, text, _TEXT_BYTES)
        return _text(text)


def _text(buffer: ctypes.Array[ctypes.c_char]) -> str:
    return buffer.value.decode(errors="replace")
