"""Tokens per second of accelerate's disk offload: transformers' own model, every weight fetched from disk when used.

Usage: python benchmarks/peers/run_accelerate.py FOLDER --config CONFIG.json [--prompt-tokens 8] [--tokens 3]

Weights are bf16, random, written to FOLDER when they are not there yet (as large as the model in bf16). Each token
reads nearly all of it, so a few tokens say enough. The last line of stdout is one JSON document.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import finish, peak_rss_bytes, prompt_ids


def write_weights(model: torch.nn.Module, folder: Path) -> None:
    """Random numbers of unit gain in the files that accelerate reads."""
    from accelerate.utils import offload_weight, save_offload_index

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 24, generator=generator)
    index: dict[str, dict[str, object]] = {}
    for name, tensor in model.state_dict().items():
        flat = pool.repeat(-(-tensor.numel() // len(pool)))[: tensor.numel()]
        gain = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.0
        weight = (flat * gain + (tensor.dim() == 1)).view(tensor.shape).to(torch.bfloat16)
        index = offload_weight(weight, name, str(folder), index=index)
    save_offload_index(index, str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--write-only", action="store_true")
    options = parser.parse_args()
    from accelerate import disk_offload, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from offload_moe.families.cache_name import cache_from, with_cache

    torch.set_num_threads(options.threads)
    raw = json.loads(options.config.read_text())
    config = AutoConfig.for_model(**raw)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if not (options.folder / "index.json").exists():
        write_weights(model, options.folder)
    if options.write_only:
        finish({"checkpoint_bytes": sum(file.stat().st_size for file in options.folder.iterdir())})
        return
    disk_offload(model, options.folder, execution_device=torch.device("cpu"), offload_buffers=False)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # rotary frequencies
            raise SystemExit(f"{name} has no value")
    ids = torch.tensor([prompt_ids(0, options.prompt_tokens)])
    began = time.perf_counter()
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True)
        prompt_s = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(options.tokens):
            token = cache.logits[:, -1:].argmax(-1)
            cache = model(input_ids=token, **with_cache(cache_from(cache)), use_cache=True)
    decode_s = time.perf_counter() - began
    run = {
        "prompt_tokens_per_s": options.prompt_tokens / prompt_s,
        "decode_tokens_per_s": options.tokens / decode_s,
    }
    finish({"peak_rss_bytes": peak_rss_bytes(), "runs": [run]})


if __name__ == "__main__":
    main()
