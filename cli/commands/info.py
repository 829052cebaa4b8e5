"""`offload-moe info`: the contents of one store."""

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_moe.system.names import check_installed, split_gguf_name
from offload_moe.system.paths import user_path
from offload_moe.system.sizes import format_size

from ..installed import entry_to_json, origin_text, state_text, vllm_command
from ..options import Subparsers
from ..terminal import safe

if TYPE_CHECKING:
    from offload_moe.store import Store
    from offload_moe.store.installed import Installed

NOT_HERE = "GGUF file on the hub, not downloaded"
UPGRADE = "an older version wrote it: `offload-moe verify STORE --upgrade` makes reads from the disk cheaper"


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "info",
        help="show the contents of a store",
        description="Show the contents of a store: source and revision, codecs, layers, sizes, checksums; for a source "
        "on the hub, the command that serves the same revision with vLLM. Reads only the manifest; `verify` reads "
        "everything.",
    )
    parser.add_argument(
        "store",
        metavar="STORE",
        help="store, by path or by its name in `offload-moe list`, or a GGUF file, also of the hub",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    with ExitStack() as stack:
        name, is_here = _named(options.store, stack)
        return _show(name, is_here=is_here, as_json=options.json)


def _named(name: str, stack: ExitStack) -> "tuple[str | Path, bool]":
    """The folder of a store, and whether its weights are on this disk: of a GGUF file on the hub only the header is."""
    path = user_path(name)
    is_on_hub = split_gguf_name(name) is not None and not path.exists()
    if not is_on_hub:
        check_installed(name)
    from offload_moe.checkpoint.gguf_hub import find_gguf
    from offload_moe.checkpoint.gguf_split import is_gguf
    from offload_moe.convert.gguf_source import view_of_headers
    from offload_moe.convert.sources import ensure_view

    if is_gguf(path):
        return ensure_view(path, name), True
    if not is_on_hub:
        return name, True
    found = find_gguf(name, revision=None, token=None)
    if (cached := found.cached()) is not None:
        return ensure_view(cached, name), True
    return stack.enter_context(view_of_headers(found)), False


def _show(name: "str | Path", *, is_here: bool, as_json: bool) -> int:
    from offload_moe.store.installed import find
    from offload_moe.store.resume import resume_advice

    entry = find(name)
    details = _details(entry) if entry.kind == "store" else {}
    if as_json:
        where = {} if is_here else {"name": None, "path": None, "kind": NOT_HERE}
        print(json.dumps(entry_to_json(entry) | {"vllm": vllm_command(entry)} | details | where, indent=2))
        return 0
    lines = [("what", NOT_HERE)]
    if is_here:
        lines = [("name", entry.name), ("path", str(entry.path)), ("what", state_text(entry))]
    lines += [("source", origin_text(entry)), ("size", format_size(entry.num_bytes)), *_lines(entry, details)]
    lines += [("with vLLM", _for_vllm(entry, details))]
    lines += [("problem", " ".join((entry.problem or "").split()))]
    lines += [("next", resume_advice(entry.path) if entry.kind == "conversion" else "")]
    for name, value in lines:
        if value:
            print(safe(f"{name:<12} {value}"))
    return 0


def _details(entry: "Installed") -> dict[str, Any]:
    from offload_moe.store import Store
    from offload_moe.store.installed import fingerprint

    store = Store.open(entry.path)
    return {
        "fingerprint": fingerprint(entry.path),
        "layers": [
            {"name": layer.name, "num_experts": layer.num_experts, "record_bytes": layer.record_bytes}
            for layer in store.layers
        ],
        "types": types_of(store),
        "importances": asdict(store.importances) if store.importances is not None else None,
        "adapter": store.adapter.name if store.adapter is not None else None,
        "experts_bytes": store.experts_bytes,
        "dense_bytes": store.dense_bytes,
        "multi_token_prediction_bytes": store.mtp_bytes,
        "notices": list(store.notices),
        "files_in_rows": [file.name for file in store.files_in_rows()],
        "num_dense_tensors": len(store.dense),
        "num_checksums": sum(1 for _ in store.pieces()),
    }


def types_of(store: "Store") -> list[str]:
    """The types of the experts of a store that keeps those of a GGUF file, in the order of their first use."""
    from offload_moe.quant.gguf import parse_gguf

    codecs = [parse_gguf(layer.codec or "") for layer in store.layers]
    return list(dict.fromkeys(kind.name for codec in codecs if codec is not None for kind in codec.kinds))


def _importances(found: dict[str, str] | None) -> str:
    if found is None:
        return ""
    return (
        f"the importance matrix {found['name']}" if found["kind"] == "imatrix" else f"calibration text: {found['name']}"
    )


def _for_vllm(entry: "Installed", details: dict[str, Any]) -> str:
    command = vllm_command(entry) or ""
    return f"{command} (without the adapter)" if command and details.get("adapter") else command


def _lines(entry: "Installed", details: dict[str, Any]) -> list[tuple[str, str]]:
    if not details:
        return [("codec", entry.codec or "")]
    layers = details["layers"]
    num_experts = sum(layer["num_experts"] for layer in layers)
    largest = max(layer["record_bytes"] for layer in layers)
    types = f" ({', '.join(details['types'])})" if details["types"] else ""
    experts = f"{num_experts:,} in {len(layers)} layers, {entry.codec}{types}, {format_size(details['experts_bytes'])}"
    dense = f"{details['num_dense_tensors']:,} tensors, {entry.dense_codec}, {format_size(details['dense_bytes'])}"
    guesses = details["multi_token_prediction_bytes"]
    return [
        ("experts", f"{experts}, {format_size(largest)} each"),
        ("rest", dense),
        ("guesses", f"multi-token prediction, {format_size(guesses)}" if guesses else ""),
        *(("notice", notice) for notice in details["notices"]),
        ("weighed by", _importances(details["importances"])),
        ("adapter", details["adapter"] or ""),
        ("checksums", f"{details['num_checksums']:,}, fingerprint {details['fingerprint']}"),
        ("next", UPGRADE if details["files_in_rows"] else ""),
    ]
