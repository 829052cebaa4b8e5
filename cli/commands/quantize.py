"""`offload-moe quantize`: converts a checkpoint to an expert store."""

import argparse
import sys
from pathlib import Path

from offload_moe.system.names import check_source, hub_name

from ..ending import EndedBySignal
from ..options import CODEC_HELP, DENSE_CODECS, SCALES, Subparsers, add_codec, add_link_flag
from ..progress import reporter


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="convert a checkpoint to an expert store",
        description="Convert a Hugging Face checkpoint to an expert store. A conversion can be stopped at any moment "
        "and is resumed by the same command.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="checkpoint folder, GGUF file, or hub id such as Qwen/Qwen3-30B-A3B"
    )
    parser.add_argument("store", metavar="STORE", help="folder to write")
    add_codec(parser, CODEC_HELP)
    parser.add_argument(
        "--dense-codec", choices=DENSE_CODECS, default="bf16", help="format of the other weights (default: bf16)"
    )
    parser.add_argument(
        "--scales",
        choices=SCALES,
        default="error",
        help="of nf4 and int8: error (default) is that of least squared error, absmax gives bitsandbytes' own bits",
    )
    weighing = parser.add_mutually_exclusive_group()
    weighing.add_argument(
        "--imatrix",
        metavar="FILE",
        help="weigh the errors of nf4 and int8 by llama.cpp's importance matrix of this model, in GGUF form",
    )
    weighing.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="the model reads this text first, or a built-in one (auto); errors of nf4 and int8 are weighed by the "
        "inputs of each matrix",
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="merge a LoRA adapter in PEFT's files, which may lie beside the weights"
    )
    parser.add_argument("--revision", metavar="REF", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--delete-source-shards",
        action="store_true",
        help="for a hub id: download shard by shard beside the store, and delete each shard once it is converted",
    )
    add_link_flag(parser)


def run(options: argparse.Namespace) -> int:
    try:
        store = _convert(options)
    except (KeyboardInterrupt, EndedBySignal):
        print("Stopped. The same command resumes the conversion.", file=sys.stderr)
        raise
    print(f"Wrote {store}. To use it: offload-moe chat {store}", file=sys.stderr)
    return 0


def _convert(options: argparse.Namespace) -> Path:
    source, revision = hub_name(options.source, options.revision)
    check_source(source)
    with reporter() as report:
        report("Loading libraries")
        from offload_moe.convert.quantize import quantize

        return quantize(
            source,
            options.store,
            codec=options.codec,
            dense_codec=options.dense_codec,
            scales=options.scales,
            imatrix=options.imatrix,
            calibrate=options.calibrate,
            adapter=options.adapter,
            revision=revision,
            delete_source_shards=options.delete_source_shards,
            follow_links=bool(options.follow_links),
            progress=report,
            on_notice=report.notice,
        )
