"""Flags that several commands share, and what they become."""

import argparse
from typing import Any, TypeAlias

from offload_moe.errors import ConfigError
from offload_moe.system.names import choice
from offload_moe.system.sizes import parse_size

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
CODECS = ("nf4", "int8", "bf16", "mxfp4")
DENSE_CODECS = ("nf4", "int8", "bf16")
DTYPES = ("fp32", "bf16", "fp16")
POLICIES = ("lru", "lfu", "decayed", "slru", "lru-2", "knn")
REPLAYS = (*POLICIES, "belady", "all")  # what `profile --replay` takes
CODEC_HELP = "format of the experts (default: mxfp4 for a checkpoint in MXFP4, nf4 for any other)"
MOST_TOKENS = 1 << 31
SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "seed": int, "max_new_tokens": int}


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and what libraries say")


def add_display_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="store_true", help="show answers as they are: no Markdown on a terminal")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Where the model's parts may live, and how a checkpoint is read."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--vram", type=parse_size, metavar="SIZE", help="GPU memory to use, such as 10GiB (default: what is free)"
    )
    group.add_argument(
        "--ram", type=parse_size, metavar="SIZE", help="RAM to use, such as 32GiB (default: what is free)"
    )
    group.add_argument(
        "--context",
        type=context_tokens,
        metavar="TOKENS",
        help="room for this many tokens (default: what fits, 8192 at most)",
    )
    group.add_argument(
        "--policy", type=policy_name, metavar="NAME", help=f"which experts to keep, one of {', '.join(POLICIES)}"
    )
    group.add_argument(
        "--hybrid",
        choices=("off", "auto", "on"),
        help="with a GPU: let the CPU compute experts that the link would bring too late (default: auto)",
    )
    group.add_argument("--device", metavar="NAME", help="where to compute, such as cuda or cpu (default: a GPU if any)")
    group.add_argument("--dtype", choices=DTYPES, help="what to compute in (default: bf16 on a GPU, fp32 on the CPU)")
    group.add_argument(
        "--exact",
        action="store_true",
        default=None,
        help="keep activations in full precision on the CPU, slower; bf16 experts then give transformers' bits",
    )
    group = parser.add_argument_group("reading a checkpoint (a store has its own)")
    group.add_argument("--codec", choices=CODECS, help=CODEC_HELP)
    group.add_argument(
        "--dense-codec",
        choices=DENSE_CODECS,
        help="format of the rest (default: bf16 on disk, in memory the most exact that fits)",
    )
    group.add_argument("--revision", metavar="REF", help="branch, tag or commit of a hub id")
    add_link_flag(group)


def add_link_flag(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    parser.add_argument(
        "--follow-links",
        action="store_true",
        default=None,
        help="also read what links in a checkpoint folder lead to where that is another user's",
    )


def policy_name(text: str) -> str:
    """Raises: ConfigError. With `profile --replay` more names are policies; loading refuses those."""
    return choice("policy", text, REPLAYS if text in REPLAYS else POLICIES)


def context_tokens(text: str) -> int:
    """A number of tokens, such as 8192 or 8,192. Raises: ConfigError."""
    digits = text.replace(",", "").replace("_", "")
    if not (digits.isascii() and digits.isdigit()) or not 0 < int(digits[:20]) < MOST_TOKENS:
        raise ConfigError(
            f"A context of {text!r} tokens is not usable. It must be a whole number from 1, such as 8192."
        )
    return int(digits)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How answers are drawn; the defaults are the model's own."""
    group = parser.add_argument_group("sampling (defaults: the model's own)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token each time")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens with this much probability"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens, 0 from all")
    group.add_argument("--seed", type=int, metavar="N", help="draw the same way each time")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    group.add_argument("--system", metavar="TEXT", help="system prompt")


def load_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the user chose of `offload_moe.LoadOptions`; the rest keeps its defaults there."""
    names = (
        *("vram", "ram", "context", "policy", "hybrid", "device", "dtype"),
        *("codec", "dense_codec", "revision", "follow_links", "exact"),
    )
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def sampling_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the user chose of `offload_moe.chat.Sampling`'s fields."""
    return {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
