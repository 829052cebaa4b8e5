"""Codecs of extensions, held to what conversion and arithmetic rely on."""

import re
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from offload_moe.quant.codec import Codec
from offload_moe.quant.layout import ExpertShape, RecordLayout
from offload_moe.system.extensions import Extension, find_extension

METHODS = ("layout", "encode", "decode")


def extended_codec(name: str) -> Codec | None:
    """The codec of an extension; None where there is none. Raises: ConfigError when it is broken."""
    extension = find_extension("codec", name)
    return None if extension is None else _checked(extension)


@cache
def _checked(extension: Extension) -> Codec:
    codec = extension.load()
    missing = [method for method in METHODS if not callable(getattr(codec, method, None))]
    if missing or isinstance(codec, type):
        raise extension.fault(f"is {codec!r}, not an object with the methods {', '.join(METHODS)}")
    if not re.fullmatch(r"[\w.-]+", extension.name):
        raise extension.fault("has a name that is no part of a file's name")
    return ExtendedCodec(codec, extension)


class ExtendedCodec:
    """The codec of an extension: its errors name the distribution, and results have the promised form."""

    def __init__(self, codec: Codec, extension: Extension) -> None:
        self.name = extension.name
        self._codec = codec
        self._extension = extension

    def layout(self, shape: ExpertShape) -> RecordLayout:
        with self._extension.guard():
            layout = self._codec.layout(shape)
            if not isinstance(layout, RecordLayout):
                raise TypeError(f"layout() gives {type(layout).__name__}, not a RecordLayout")
        return layout

    def encode(self, shape: ExpertShape, tensors: Mapping[str, Tensor]) -> Tensor:
        """As `Codec.encode`. Raises: ConfigError, and what the codec raises for weights that it cannot encode."""
        with self._extension.guard():
            record = self._codec.encode(shape, tensors)
            self._check("encode()", record, torch.uint8, (self.layout(shape).record_bytes,))
        return record

    def decode(self, shape: ExpertShape, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        with self._extension.guard():
            tensors = self._codec.decode(shape, record, dtype)
            for name, dims in shape.module_shapes().items():
                self._check(f"decode()[{name!r}]", tensors[name], dtype, dims)
        return tensors

    def _check(self, what: str, value: Tensor, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
        if (value.dtype, value.shape) != (dtype, dims):
            found = f"{value.dtype} {list(value.shape)}"
            raise self._extension.fault(f"is broken: {what} gives {found} in place of {dtype} {list(dims)}")
