"""The exceptions of this package.

OffloadMoeError
├── ConfigError            a flag, argument or environment variable is not usable
├── NativeLibraryError     the native library is not built, or is built from other sources
├── CheckpointError        the source checkpoint is missing, damaged or contradicts its index
├── StoreError             the expert store cannot be used
│   ├── StoreCorrupt       its bytes do not match its checksums
│   └── StoreVersion       it was written by another format version
├── BudgetError            the plan does not fit in VRAM, RAM or disk
├── UnsupportedModelError  the model has a layer this version cannot bind
├── DevicePassUnavailable  the device pass cannot serve this model on this machine; the message is the reason
├── TransferError          bytes could not be moved: disk read, H2D copy, download
└── ModelClosed            the model was closed, or stayed in the parent of a forked process

A message states what failed, the numbers, and a remedy.
"""


class OffloadMoeError(Exception):
    """Base class: the command line prints it in one line and exits with 1."""


class ConfigError(OffloadMoeError):
    """A flag, argument or environment variable is not usable."""


class NativeLibraryError(OffloadMoeError):
    """The native library is not built, or is built from other sources than this Python code."""


class CheckpointError(OffloadMoeError):
    """The source checkpoint is missing, damaged or contradicts its index."""


class StoreError(OffloadMoeError):
    """The expert store cannot be used."""


class StoreCorrupt(StoreError):
    """The store's bytes do not match its checksums."""


class StoreVersion(StoreError):
    """The store was written by another format version."""


class BudgetError(OffloadMoeError):
    """The plan does not fit in VRAM, RAM or disk."""


class UnsupportedModelError(OffloadMoeError):
    """The model has a layer this version cannot bind."""


class DevicePassUnavailable(OffloadMoeError):
    """The device pass cannot serve this model on this machine: the message is the reason, without a final period."""


class TransferError(OffloadMoeError):
    """Bytes could not be moved: a disk read, an H2D copy or a download failed."""


class ModelClosed(OffloadMoeError):
    """The model was closed, or was loaded before this process was forked."""
