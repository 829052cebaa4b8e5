"""llama.cpp through `llama-cpp-python`, built for this processor: the fastest that it is.

Needs the standard library and that package only.
"""

import argparse
import ctypes
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from harness import HOT_SAMPLING, bind_to_cores, io_bytes, prompt_ids

BATCH = 2048
ERROR = 4  # of llama.cpp's log levels
CACHE_TYPES = {"f16": 1, "bf16": 30, "q8_0": 8}  # ggml's numbers
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
# The kernel's name of an instruction set, and llama.cpp's.
INSTRUCTIONS = {
    "avx": "AVX",
    "avx2": "AVX2",
    "avx_vnni": "AVX_VNNI",
    "f16c": "F16C",
    "fma": "FMA",
    "bmi2": "BMI2",
    "avx512f": "AVX512",
    "avx512vbmi": "AVX512_VBMI",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
}


def describe() -> dict[str, Any]:
    """Which build this is, and which instructions of this processor it was built without."""
    import llama_cpp

    info = llama_cpp.llama_print_system_info().decode()
    return {
        "build": f"llama-cpp-python {llama_cpp.__version__}",
        "system_info": info,
        "missing_instructions": missing_instructions(info, Path("/proc/cpuinfo").read_text()),
    }


def missing_instructions(system_info: str, cpuinfo: str) -> list[str]:
    """What the processor has and the library does not use."""
    line = next((line for line in cpuinfo.splitlines() if re.match(r"(flags|Features)\s*:", line)), "")
    has = set(line.partition(":")[2].split())
    used = set(re.findall(r"(\w+) = 1", system_info))
    return [name for flag, name in INSTRUCTIONS.items() if flag in has and name not in used]


def print_error(level: int, text: bytes, _: object) -> None:
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)


class NativeEngine:
    """A GGUF file in a context of one sequence, or of so many as there are slots."""

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp

        self._lib, self._threads, self._cores = llama_cpp, options.threads, os.sched_getaffinity(0)
        bind_to_cores(options.threads)
        self._log = llama_cpp.llama_log_callback(print_error)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        began = time.perf_counter()
        llama_cpp.llama_backend_init()
        of_model = llama_cpp.llama_model_default_params()
        of_model.n_gpu_layers = 0
        of_model.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if options.mapped else llama_cpp.LLAMA_LOAD_MODE_NONE
        of_model.use_extra_bufts = not (options.mapped or options.no_repack)
        self._model = llama_cpp.llama_model_load_from_file(options.model.encode(), of_model)
        if not self._model:
            raise SystemExit(f"llama.cpp could not load {options.model}")
        self._context = llama_cpp.llama_init_from_model(self._model, self._context_params(options))
        self._sampler: Any = None
        self._token = ctypes.c_int32(0)
        self.figures = {"load_s": time.perf_counter() - began}

    def _context_params(self, options: argparse.Namespace) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = options.context * options.slots, options.slots
        params.n_batch, params.n_ubatch = BATCH, options.ubatch
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = FLASH_ATTENTION[options.flash_attention]
        params.type_k, params.type_v = CACHE_TYPES[options.keys], CACHE_TYPES[options.values]
        params.swa_full = False  # a window needs no more than its own keys
        params.no_perf = True
        return params

    def prompt(self, *, num_tokens: int, seed: int, all_cores: bool = False) -> dict[str, float]:
        lib, read = self._lib, io_bytes()["from_disk"]
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        self._make_sampler(seed)
        self._use_cores(len(self._cores) if all_cores else self._threads)
        ids = (ctypes.c_int32 * num_tokens)(*prompt_ids(seed, num_tokens))
        began_cpu_s, began = time.process_time(), time.perf_counter()
        for first in range(0, num_tokens, BATCH):
            part = (ctypes.c_int32 * min(BATCH, num_tokens - first)).from_buffer(ids, 4 * first)
            self._compute(part, len(part))
        self._sample()
        elapsed_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu_s
        self._use_cores(self._threads)
        return {
            "prompt_tokens_per_s": num_tokens / elapsed_s,
            "prompt_cpu_ms": 1e3 * cpu_s / num_tokens,
            "prompt_disk_bytes": io_bytes()["from_disk"] - read,
        }

    def decode(self, *, num_tokens: int) -> dict[str, float]:
        read, began_cpu_s, began = io_bytes()["from_disk"], time.process_time(), time.perf_counter()
        for _ in range(num_tokens):
            self._compute(ctypes.pointer(self._token), 1)
            self._sample()
        elapsed_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu_s
        return {
            "decode_tokens_per_s": num_tokens / elapsed_s,
            "decode_cpu_ms": 1e3 * cpu_s / num_tokens,
            "decode_disk_bytes": io_bytes()["from_disk"] - read,
        }

    def slots(self, *, prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
        """Answers of several sequences at once, a token of each per pass; measured behind the first of each."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        samplers = [self._sampler_of(seed) for seed in range(len(prompts))]
        batch = lib.llama_batch_init(max(len(prompts), *map(len, prompts)), 0, 1)
        tokens = []
        for slot, prompt in enumerate(prompts):
            _fill(batch, [(token, at, slot) for at, token in enumerate(prompt)])
            self._decode(batch)
            tokens.append(lib.llama_sampler_sample(samplers[slot], self._context, len(prompt) - 1))
        began_cpu_s, began = time.process_time(), time.perf_counter()
        for step in range(num_tokens - 1):
            _fill(batch, [(tokens[slot], len(prompt) + step, slot) for slot, prompt in enumerate(prompts)])
            self._decode(batch)
            tokens = [lib.llama_sampler_sample(sampler, self._context, row) for row, sampler in enumerate(samplers)]
        elapsed_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu_s
        lib.llama_batch_free(batch)
        for sampler in samplers:
            lib.llama_sampler_free(sampler)
        num_decoded = len(prompts) * (num_tokens - 1)
        return {"decode_tokens_per_s": num_decoded / elapsed_s, "decode_cpu_ms": 1e3 * cpu_s / num_decoded}

    def _compute(self, tokens: Any, count: int) -> None:
        self._decode(self._lib.llama_batch_get_one(tokens, count))

    def _decode(self, batch: Any) -> None:
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")

    def _sample(self) -> None:
        self._token.value = self._lib.llama_sampler_sample(self._sampler, self._context, -1)

    def _make_sampler(self, seed: int) -> None:
        if self._sampler is not None:
            self._lib.llama_sampler_free(self._sampler)
        self._sampler = self._sampler_of(seed)

    def _sampler_of(self, seed: int) -> Any:
        lib = self._lib
        sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(sampler, lib.llama_sampler_init_temp(HOT_SAMPLING["temperature"]))
        lib.llama_sampler_chain_add(sampler, lib.llama_sampler_init_dist(seed))
        return sampler

    def _use_cores(self, num_threads: int) -> None:
        os.sched_setaffinity(0, sorted(self._cores)[:num_threads])
        self._lib.llama_set_n_threads(self._context, self._threads, num_threads)


def _fill(batch: Any, rows: list[tuple[int, int, int]]) -> None:
    """rows: token, position and slot of each. Logits are given behind all of them."""
    batch.n_tokens = len(rows)
    for row, (token, position, slot) in enumerate(rows):
        batch.token[row], batch.pos[row], batch.logits[row] = token, position, 1
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, slot
