"""Codecs: how one expert becomes one contiguous record of bytes."""

from offload_moe.errors import ConfigError
from offload_moe.quant.bf16 import Bf16Codec
from offload_moe.quant.codec import ABSMAX, LEAST_ERROR, SCALES, Codec
from offload_moe.quant.extended import extended_codec
from offload_moe.quant.gguf import GGUF, parse_gguf
from offload_moe.quant.int8 import Int8Codec
from offload_moe.quant.layout import ExpertShape, Matrix, Plane, RecordLayout
from offload_moe.quant.mxfp4 import Mxfp4Codec
from offload_moe.quant.nf4 import Nf4Codec
from offload_moe.system.extensions import with_extensions

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Nf4Codec(), Int8Codec(), Bf16Codec(), Mxfp4Codec())}


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises: ConfigError with the list of names, or for an extension that is broken."""
    if (found := parse_gguf(name) or CODECS.get(name) or extended_codec(name)) is not None:
        return found
    raise ConfigError(
        f"Unknown codec {name!r}: it is not built in, and no installed package registers it. Choose one of: "
        f"{', '.join(codec_names())}."
    )


def codec_names() -> tuple[str, ...]:
    """Built-in codecs, then those of extensions."""
    return with_extensions("codec", tuple(CODECS))


def is_built_in(name: str) -> bool:
    """Whether a codec is one of this package, GGUF's types included."""
    return name in CODECS or name.partition(":")[0] == GGUF


__all__ = [
    "ABSMAX",
    "CODECS",
    "GGUF",
    "LEAST_ERROR",
    "SCALES",
    "Codec",
    "ExpertShape",
    "Matrix",
    "Plane",
    "RecordLayout",
    "codec_names",
    "get_codec",
    "is_built_in",
]
