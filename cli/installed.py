"""Entries of the cache folder as text and as JSON."""

import shlex
from typing import TYPE_CHECKING, Any

from offload_moe.system.names import looks_like_hub_id

if TYPE_CHECKING:
    from offload_moe.store.installed import Installed

REVISION_DIGITS = 12


def entry_to_json(entry: "Installed") -> dict[str, Any]:
    return {
        "name": entry.name,
        "path": str(entry.path),
        "kind": entry.kind,
        "bytes": entry.num_bytes,
        "codec": entry.codec,
        "dense_codec": entry.dense_codec,
        "source": entry.source,
        "revision": entry.revision,
        "problem": entry.problem,
    }


def state_text(entry: "Installed") -> str:
    return {"conversion": "unfinished conversion", "demo": "demo checkpoint"}.get(entry.kind, entry.kind)


def origin_text(entry: "Installed") -> str:
    """Source and revision, as in `Qwen/Qwen3-30B-A3B@ad44e777bcd1`; unknown parts are left out."""
    revision = f"@{entry.revision[:REVISION_DIGITS]}" if entry.revision else ""
    return f"{entry.source}{revision}" if entry.source else ""


def vllm_command(entry: "Installed") -> str | None:
    """The command that serves the same revision of the source with vLLM; None unless both are of the hub."""
    if not entry.revision or not looks_like_hub_id(entry.source or ""):
        return None
    return shlex.join(["vllm", "serve", str(entry.source), "--revision", entry.revision])
