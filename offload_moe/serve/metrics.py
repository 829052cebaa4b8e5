"""`/metrics` in the text format of Prometheus."""

from collections.abc import Iterator

from offload_moe.serve.board import Histogram
from offload_moe.serve.host import Host
from offload_moe.serve.live import live

PREFIX = "offload_moe_"
FOUND = ("hits", "delayed", "misses")


def metrics(host: Host) -> str:
    """All series of one server."""
    return "\n".join(_lines(host)) + "\n"


def _lines(host: Host) -> Iterator[str]:
    now, board = live(host), host.board
    outcomes = {**now["requests"], "failed": board.num_failed}
    yield from _head("requests_total", "counter", "Requests by outcome.")
    for outcome in ("finished", "cancelled", "failed", "refused"):
        yield f'{PREFIX}requests_total{{outcome="{outcome}"}} {outcomes[outcome]}'
    yield from _one("requests_running", "gauge", "Requests in the engine.", outcomes["running"])
    yield from _one("requests_waiting", "gauge", "Requests in the queue.", outcomes["waiting"])
    yield from _head("tokens_total", "counter", "Prompt tokens computed, prompt tokens reused, tokens generated.")
    for kind, number in now["tokens"].items():
        yield f'{PREFIX}tokens_total{{kind="{kind}"}} {number}'
    yield from _head("experts_total", "counter", "Routed experts by how the fast tier had them, and its changes.")
    for kind, number in now["experts"].items():
        yield f'{PREFIX}experts_total{{kind="{kind}"}} {number}'
    passes = now["passes"]
    yield from _one("decode_passes_total", "counter", "Passes of the decoder behind the prompts.", passes["number"])
    yield from _one("decode_rows_total", "counter", "Tokens in these passes, guessed ones included.", passes["rows"])
    yield from _head("guesses_total", "counter", "Tokens that were guessed and computed ahead, by whether they came.")
    for kind in ("right", "wrong"):
        yield f'{PREFIX}guesses_total{{kind="{kind}"}} {now["guesses"][kind]}'
    saved_s = now["guesses"]["saved_s"]  # may fall, where guesses cost more than they gave
    yield from _one("guesses_saved_seconds", "gauge", "Seconds that passes without guesses would add.", saved_s)
    gain = now["guesses"]["gain"]
    yield from _one("guess_gain", "gauge", "Decode seconds without guesses over those with them.", gain)
    yield from _one("stall_seconds_total", "counter", "Seconds that compute has waited for experts.", now["stall_s"])
    yield from _head("bytes_total", "counter", "Bytes read from disk, and copied to the device.")
    for kind, number in now["bytes"].items():
        yield f'{PREFIX}bytes_total{{kind="{kind}"}} {number}'
    yield from _tiers(now["slots"])
    yield from _head("memory_bytes", "gauge", "Bytes in use by part.")
    for part, number in now["memory"].items():
        yield f'{PREFIX}memory_bytes{{part="{part}"}} {number}'
    yield from _one("prefixes_kept", "gauge", "Conversations whose caches are kept.", now["prefixes"]["kept"])
    yield from _one("prefix_tokens", "gauge", "Tokens in kept caches.", now["prefixes"]["tokens"])
    yield from _one("model_loaded", "gauge", "1 while the model is loaded.", int(host.loaded is not None))
    yield from _histogram("first_token_seconds", "Seconds from a request to its first token.", board.first_token_s)


def _tiers(slots: dict[str, dict[str, int] | None]) -> Iterator[str]:
    for name, text in (("slots", "Expert slots of a tier."), ("resident", "Experts in a tier.")):
        yield from _head(f"tier_{name}", "gauge", text)
        for tier, numbers in slots.items():
            if numbers is not None:
                yield f'{PREFIX}tier_{name}{{tier="{tier}"}} {numbers[name]}'
    yield from _head("tier_experts_total", "counter", "Experts looked up in a tier, by how it had them.")
    for tier, numbers in slots.items():
        if numbers is not None:
            for found in FOUND:
                yield f'{PREFIX}tier_experts_total{{tier="{tier}",found="{found}"}} {numbers[found]}'


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {PREFIX}{name} {text}"
    yield f"# TYPE {PREFIX}{name} {kind}"


def _one(name: str, kind: str, text: str, value: float) -> Iterator[str]:
    yield from _head(name, kind, text)
    yield f"{PREFIX}{name} {value}"


def _histogram(name: str, text: str, histogram: Histogram) -> Iterator[str]:
    yield from _head(name, "histogram", text)
    total = 0
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        total += count
        yield f'{PREFIX}{name}_bucket{{le="{bound}"}} {total}'
    yield f"{PREFIX}{name}_sum {histogram.total}"
    yield f"{PREFIX}{name}_count {total}"
