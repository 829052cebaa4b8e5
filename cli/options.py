"""Flags that several commands share, and their values as settings."""

import argparse
from collections.abc import Iterator
from typing import Any, TypeAlias

from offload_moe.system.extensions import with_extensions
from offload_moe.system.names import no_such
from offload_moe.system.settings import read_settings
from offload_moe.system.sizes import parse_size, parse_tokens

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
CODECS = ("nf4", "int8", "bf16", "mxfp4")
DENSE_CODECS = ("nf4", "int8", "bf16")
SCALES = ("error", "absmax")
DTYPES = ("fp32", "bf16", "fp16")
POLICIES = ("lru", "lfu", "decayed", "slru", "lru-2", "knn")
GUESSES = ("auto", "off", "ngram", "mtp", "draft")
REPLAYS = (*POLICIES, "belady", "all")  # a value of `profile --replay --policy`
CODEC_HELP = (
    "format of the experts, one of these or an extension's (default: a GGUF file's own, mxfp4 for a checkpoint in "
    "MXFP4, nf4 for any other)"
)
SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "seed": int, "max_new_tokens": int}
SETTINGS = SAMPLING | {"speculate": str}  # of a chat
MEMORY = ("vram", "ram", "context")  # of `offload-moe config`


def add_display_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="store_true", help="show answers unchanged: no Markdown on a terminal")


def add_device_pass(group: "argparse._ActionsContainer") -> None:
    group.add_argument(
        "--device-pass",
        choices=("auto", "off"),
        help="on an NVIDIA card: decode by the project's own kernels where they fit (default: auto)",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for memory, device, and the reading of a checkpoint."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--vram", type=parse_size, metavar="SIZE", help="GPU memory to use, such as 10GiB (default: the free memory)"
    )
    group.add_argument(
        "--ram", type=parse_size, metavar="SIZE", help="RAM to use, such as 32GiB (default: the free memory)"
    )
    group.add_argument(
        "--context",
        type=parse_tokens,
        metavar="TOKENS",
        help="memory for this many tokens (default: as many as fit, at most 8192)",
    )
    group.add_argument(
        "--policy",
        type=policy_name,
        metavar="NAME",
        help=f"which experts to keep, one of {', '.join(POLICIES)}, or an extension's",
    )
    group.add_argument(
        "--hybrid",
        choices=("off", "auto", "on"),
        help="with a GPU: the CPU computes experts that it finishes before the link could copy them (default: auto)",
    )
    add_device_pass(group)
    group.add_argument(
        "--device", metavar="NAME", help="device to compute on, such as cuda or cpu (default: a GPU if there is one)"
    )
    group.add_argument(
        "--speculate",
        choices=GUESSES,
        help="guess tokens, to compute several at once; the answers stay the same (default: auto, while it pays); "
        "mtp takes the layer that some checkpoints bring for it; draft is followed by a MODEL, see --draft",
    )
    group.add_argument(
        "--draft",
        metavar="MODEL",
        help="checkpoint folder or hub id of a small model of the same vocabulary that guesses",
    )
    group.add_argument("--dtype", choices=DTYPES, help="dtype to compute in (default: bf16 on a GPU, fp32 on the CPU)")
    group.add_argument(
        "--exact",
        action="store_true",
        default=None,
        help="full precision of activations on the CPU, slower; with bf16 experts the results equal transformers' bits",
    )
    group = parser.add_argument_group("reading a checkpoint (a store has its own)")
    add_codec(group, CODEC_HELP)
    group.add_argument(
        "--dense-codec",
        choices=DENSE_CODECS,
        help="format of the other weights (default: bf16 on disk, in memory the most exact that fits)",
    )
    group.add_argument("--revision", metavar="REF", help="branch, tag or commit of a hub id")
    add_link_flag(group)


class CodecChoices:
    """The names of all codecs. Those of extensions are looked up only where the built-in ones are not enough."""

    def __contains__(self, name: object) -> bool:
        return name in CODECS or name in tuple(self)

    def __iter__(self) -> Iterator[str]:
        return iter(with_extensions("codec", CODECS))


def add_codec(group: "argparse._ActionsContainer", text: str) -> None:
    group.add_argument("--codec", choices=CodecChoices(), metavar="|".join(CODECS), help=text)


def add_link_flag(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    parser.add_argument(
        "--follow-links",
        action="store_true",
        default=None,
        help="also follow links in a checkpoint folder to files of other users",
    )


def policy_name(text: str) -> str:
    """A policy's name. `profile --replay` accepts more names, which loading refuses. Raises: ConfigError."""
    if text not in REPLAYS and text not in policies():
        raise no_such("policy", text, policies())
    return text


def policies() -> tuple[str, ...]:
    """The names of all policies, those of extensions included, which takes a look at every installed package."""
    return with_extensions("policy", POLICIES)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for sampling; the defaults are the model's own."""
    group = parser.add_argument_group("sampling (defaults: the model's own)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token each time")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens with this much probability"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens, 0 from all")
    group.add_argument("--seed", type=int, metavar="N", help="seed of the random numbers, for repeatable answers")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="limit of an answer's tokens")
    group.add_argument("--system", metavar="TEXT", help="system prompt")


def fill(options: argparse.Namespace, *names: str) -> None:
    """Set flags that were not given to the user's own defaults. Raises: ConfigError when one of these is not usable."""
    chosen = read_settings()
    for name in names:
        if getattr(options, name) is None:
            setattr(options, name, chosen[name].value)


def load_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The given flags as options of `offload_moe.LoadOptions`; the others keep their defaults there."""
    names = (
        *("vram", "ram", "context", "policy", "hybrid", "device_pass", "device", "dtype"),
        *("codec", "dense_codec", "revision", "follow_links", "exact", "speculate", "draft"),
    )
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def sampling_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The given flags as fields of `offload_moe.chat.Sampling`."""
    return {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
