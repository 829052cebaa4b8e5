"""Codecs: how one expert becomes one contiguous record of bytes."""

from offload_moe.errors import ConfigError
from offload_moe.quant.bf16 import Bf16Codec
from offload_moe.quant.codec import Codec
from offload_moe.quant.gguf import parse_gguf
from offload_moe.quant.int8 import Int8Codec
from offload_moe.quant.layout import ExpertShape, Matrix, Plane, RecordLayout
from offload_moe.quant.mxfp4 import Mxfp4Codec
from offload_moe.quant.nf4 import Nf4Codec

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Nf4Codec(), Int8Codec(), Bf16Codec(), Mxfp4Codec())}


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises: ConfigError with the list of names."""
    if (found := parse_gguf(name)) is not None:
        return found
    if name not in CODECS:
        raise ConfigError(f"Unknown codec {name!r}. Choose one of: {', '.join(CODECS)}.")
    return CODECS[name]


__all__ = ["CODECS", "Codec", "ExpertShape", "Matrix", "Plane", "RecordLayout", "get_codec"]
