"""Decode of a store at several numbers of slots, for simulate_validation.py: the same answers every time."""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from ask_watch import AskWatch
from harness import HOT_SAMPLING, prompt_ids
from run_store import fill

from offload_moe import load
from offload_moe.chat.prompt import stream_tokens
from offload_moe.engine.model import Model
from offload_moe.memory.disk import readers_for
from offload_moe.native import kernels
from offload_moe.profile.trace import save_trace
from offload_moe.store import Store


def measure(
    folder: Path,
    shares: Sequence[float],
    trace_file: Path,
    result_file: Path,
    *,
    num_trials: int,
    num_answers: int,
    num_warm_up: int,
    num_threads: int,
    tokens: int,
    prompt_tokens: int,
) -> dict[str, Any]:
    """Budgets in turn within each trial, after one recorded run with everything resident. Also written to a file."""
    torch.set_num_threads(num_threads)
    kernels.set_threads(num_threads)
    store = Store.open(folder)
    num_all = sum(layer.num_experts for layer in store.layers)
    answer_all = {"num_answers": num_answers, "num_warm_up": num_warm_up, "tokens": tokens, "prompt": prompt_tokens}
    context = prompt_tokens + tokens + 1
    counts = {share: max(1, round(share * num_all)) for share in shares}
    budgets = dict(zip(shares, bytes_of(folder, list(counts.values()), context), strict=True))
    with open_model(folder, num_all, bytes_of(folder, [num_all], context)[0], context) as model:
        answers(model, **answer_all)  # so that the recorded run finds everything resident
        recorded = answers(model, **answer_all, trace_file=trace_file)
    document: dict[str, Any] = {
        "num_layers": len(store.layers),
        "num_experts": store.num_experts,
        "slot_bytes": max(layer.record_bytes for layer in store.layers),
        "num_readers": readers_for(max(layer.record_bytes for layer in store.layers)),
        "recorded": recorded,
        "budgets": {str(share): [] for share in shares},
    }
    for trial in range(num_trials):
        for share in (*shares[trial % len(shares) :], *shares[: trial % len(shares)]):
            with open_model(folder, counts[share], budgets[share], context) as model:
                prepare(model, is_whole=counts[share] == num_all)
                watch = AskWatch()
                with watch.watching():
                    result = {"num_slots": counts[share], **answers(model, **answer_all)}
                result |= {"num_passes": watch.num_passes, "ask_delays": watch.delays()}
            document["budgets"][str(share)].append(result)
            print(folder.name, share, result, file=sys.stderr, flush=True)
        result_file.write_text(json.dumps(document))  # whatever happens to the trials that follow
    return document


def bytes_of(folder: Path, num_slots: Sequence[int], context: int) -> list[int]:
    """The RAM budgets that give so many slots."""
    with load(folder, context=context, prefetch=0) as model:
        return [model.placement.ram.bytes_with(count) for count in num_slots]


def open_model(folder: Path, num_slots: int, ram: int, context: int) -> Model:
    model = load(folder, ram=ram, context=context, prefetch=0)
    assert model.engine.hierarchy.num_slots("ram") == num_slots
    model.room.borrows = False  # so many, not more
    model.hf.generation_config.eos_token_id = None
    return model


def prepare(model: Model, *, is_whole: bool) -> None:
    """Touch the memory of the slots, which costs as much as a read the first time; fill it where it holds all."""
    arena = model.engine.hierarchy.arena
    for slot in range(arena.num_slots):
        arena.slot(slot).zero_()
    if is_whole:
        fill(model)


def answers(
    model: Model, *, num_answers: int, num_warm_up: int, tokens: int, prompt: int, trace_file: Path | None = None
) -> dict[str, float]:
    """Several answers, hot sampling; the sums of those that count, per decoded token."""
    counted: list[dict[str, float]] = []
    gaps: list[float] = []
    with model.trace() if trace_file is not None else nullcontext() as recorder:
        for seed in range(num_answers):
            ids = torch.tensor([prompt_ids(seed, prompt)])
            sampling = HOT_SAMPLING | {"seed": seed, "max_new_tokens": tokens}
            with stream_tokens(model.hf, None, ids, **sampling) as stream:
                next(iter(stream))
                before = model.stats.copy()
                times = [time.perf_counter() for _ in stream]
                num_decoded = len(times)
                spent = model.stats.since(before)
                gaps += [late - early for early, late in pairwise(times)] if seed >= num_warm_up else []
                counted.append({"tokens": num_decoded, "decode_s": stream.decode_s, "stall_s": spent.stall_s,
                                "hits": spent.num_hits, "accesses": spent.num_accesses, "waves": spent.num_waves,
                                "prompt_s": stream.prompt_s})  # fmt: skip
    if trace_file is not None and recorder is not None:
        save_trace(recorder.trace(), trace_file)
    total = {name: sum(answer[name] for answer in counted[num_warm_up:]) for name in counted[0]}
    return {
        "decode_tokens_per_s": total["tokens"] / total["decode_s"],
        "median_token_s": statistics.median(gaps),
        "stall_s": total["stall_s"] / total["tokens"],
        "waves": total["waves"] / total["tokens"],
        "hit_rate": total["hits"] / total["accesses"],
        "prompt_tokens_per_s": prompt * (num_answers - num_warm_up) / total["prompt_s"],
    }
