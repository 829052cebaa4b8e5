"""Prompt and decode tokens per second of transformers on a checkpoint, in bf16 or with bitsandbytes' 4-bit linears.

Usage: python benchmarks/peers/run_transformers.py CHECKPOINT --threads 2 [--bitsandbytes] [--experts batched_mm]

bitsandbytes quantizes linears; experts that are one tensor per layer stay in bf16. The same prompt, sampling and last
line as run_llamacpp.py.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from decode_demo import Clock
from harness import HOT_SAMPLING, bind_to_cores, finish, peak_rss_bytes, prompt_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--bitsandbytes", action="store_true")
    parser.add_argument("--experts", default="batched_mm")
    options = parser.parse_args()
    bind_to_cores(options.threads)
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(options.threads)
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "experts_implementation": options.experts}
    if options.bitsandbytes:
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    began = time.perf_counter()
    hf = AutoModelForCausalLM.from_pretrained(options.checkpoint, **settings).eval().requires_grad_(False)
    load_s = time.perf_counter() - began
    runs = []
    for seed in range(options.runs):
        ids = torch.tensor([prompt_ids(seed, options.prompt_tokens)])
        clock = Clock()
        torch.manual_seed(seed)
        began = time.perf_counter()
        with torch.inference_mode():
            hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=options.tokens,
                max_new_tokens=options.tokens,
                do_sample=True,
                **HOT_SAMPLING,
                disable_compile=True,
                streamer=clock,
            )
        runs.append(
            {
                "prompt_tokens_per_s": options.prompt_tokens / (clock.times[0] - began),
                "decode_tokens_per_s": (options.tokens - 1) / (clock.times[-1] - clock.times[0]),
            }
        )
    finish({"load_s": load_s, "peak_rss_bytes": peak_rss_bytes(), "runs": runs})


if __name__ == "__main__":
    main()
