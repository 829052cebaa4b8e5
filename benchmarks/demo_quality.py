"""What the split costs: the demo Mixture of Experts against its dense origin, on text that calibration did not see.

    python benchmarks/demo_quality.py [--rebuild FOLDER] [--sequences N] [--dense FOLDER --mixture FOLDER]

Texts: `pydoc` (language reference topics), `docstrings`, `code` and `licence` come with Python; `prose` and `chat`
are `benchmarks/heldout.txt`. Sequences are as long as the calibration's. The last line of stdout is one JSON
document.
"""

import argparse
import inspect
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import finish
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from offload_moe.demo import checkpoint
from offload_moe.demo.dense import DenseModel, read_safetensors
from offload_moe.demo.source import fetch_dense
from offload_moe.system import paths
from offload_moe.system.progress import silent

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.make_demo.corpus import DOCUMENT_BREAK, pack_documents
from scripts.make_demo.recipe import RECIPE

_MODULES = (
    "argparse collections datetime decimal heapq itertools json logging pathlib random re socket string subprocess"
)
_SOURCES = "bisect calendar copy csv dataclasses difflib fnmatch gzip heapq"


def held_out_texts() -> dict[str, list[str]]:
    library = Path(sysconfig.get_path("stdlib"))
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    prose, chat = Path(__file__).with_name("heldout.txt").read_text(encoding="utf-8").split("\n\f\f\n")
    return {
        "pydoc": [topics[name] for name in sorted(topics)[::5]],
        "docstrings": [_docstrings(name) for name in _MODULES.split()],
        "code": [(library / f"{name}.py").read_text(encoding="utf-8")[2000:6000] for name in _SOURCES.split()],
        "licence": [(library / "LICENSE.txt").read_text(encoding="utf-8")],
        "prose": prose.split(DOCUMENT_BREAK),
        "chat": chat.split(DOCUMENT_BREAK),
    }


def _docstrings(name: str) -> str:
    module = import_module(name)
    members = [
        value for _, value in sorted(vars(module).items()) if inspect.isclass(value) or inspect.isfunction(value)
    ]
    return "\n\n".join(filter(None, [inspect.getdoc(module), *map(inspect.getdoc, members)]))[:4000]


def sequences(dense: DenseModel, limit: int) -> dict[str, Tensor]:
    """At most `limit` sequences of each kind of text, spread over it."""
    packed = {
        kind: pack_documents(dense.tokenizer, texts, RECIPE.num_positions) for kind, texts in held_out_texts().items()
    }
    return {
        kind: ids[torch.linspace(0, len(ids) - 1, min(limit, len(ids))).round().long()] for kind, ids in packed.items()
    }


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    total = 0.0
    for batch in ids.split(2):
        logits = model(batch).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / ids[:, 1:].numel())


@torch.inference_mode()
def routing(model: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    """Expert usage and agreement of bf16 routing with fp64 on the same bf16 inputs and weights, over all layers."""
    usage: list[Tensor] = []
    agree: list[Tensor] = []

    def watch(router: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        scores = inputs[0].flatten(0, -2).double() @ router.weight.double().T
        exact = torch.zeros_like(scores).scatter_(1, scores.topk(router.top_k, dim=1).indices, 1.0)
        chosen = torch.zeros_like(scores).scatter_(1, outputs[2], 1.0)
        usage.append(chosen.mean(dim=0))
        agree.append((exact == chosen).all(dim=1).double())

    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [router.register_forward_hook(watch) for router in routers]
    model(ids)
    for hook in hooks:
        hook.remove()
    share = torch.stack(usage)
    return {
        "expert_usage_min": float(share.min()),
        "expert_usage_max": float(share.max()),
        "bf16_top_k_agreement": float(torch.cat(agree).mean()),
        "bf16_top_k_agreement_worst_layer": min(float(layer.mean()) for layer in agree),
    }


def timed(action: Callable[[], Path]) -> tuple[Path, float]:
    start = time.perf_counter()
    return action(), time.perf_counter() - start


def say(phase: str, done: float = -1.0, total: float | None = None) -> None:
    print(f"{phase}: {done:.0f} of {total:.0f} bytes" if total else phase, file=sys.stderr)


def pair(options: argparse.Namespace) -> tuple[DenseModel, Path, float | None]:
    """The dense origin, the folder of the mixture, and the seconds that building it took."""
    if options.dense is not None:
        return read_safetensors(options.dense), options.mixture, None
    rebuild: Path | None = options.rebuild
    folder, build_s = timed(lambda: checkpoint(progress=say, cache_dir=rebuild))
    dense = fetch_dense((rebuild or paths.cache_dir()) / "downloads", silent)
    return dense, folder, build_s if rebuild else None


def measure(dense: DenseModel, folder: Path, limit: int) -> dict[str, Any]:
    ids = sequences(dense, limit)
    config = LlamaConfig(**dense.config)
    origin = LlamaForCausalLM(config).eval()
    origin.load_state_dict(dense.tensors, strict=False)
    mixture = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = {}
    for kind, tokens in ids.items():
        before, after = perplexity(origin, tokens), perplexity(mixture, tokens)
        texts[kind] = {"tokens": tokens.numel(), "dense": before, "moe": after, "ratio": after / before}
        print(f"{kind:12} {tokens.numel():6} tokens  dense {before:7.2f}  moe {after:7.2f}  ratio {after / before:.3f}")
    everything = torch.cat(list(ids.values()))
    moe = mixture.config
    shared, width = moe.shared_expert_intermediate_size, dense.config["intermediate_size"]
    per_layer = (shared + moe.num_experts_per_tok * moe.moe_intermediate_size) / width
    dense_share = len(moe.mlp_only_layers) / moe.num_hidden_layers
    return {
        "texts": texts,
        "ratio_mean": sum(text["ratio"] for text in texts.values()) / len(texts),
        "ratio_max": max(text["ratio"] for text in texts.values()),
        "active_share": dense_share + (1 - dense_share) * per_layer,
        "active_share_of_moe_layer": per_layer,
        "num_dense_layers": len(moe.mlp_only_layers),
        "shared_share": shared / width,
        "num_experts": moe.num_experts,
        "top_k": moe.num_experts_per_tok,
        **routing(mixture.to(torch.bfloat16), everything),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rebuild", type=Path, metavar="FOLDER", help="build into this empty cache folder and time it")
    parser.add_argument("--sequences", type=int, default=6, help="sequences of each kind of text (default: 6)")
    parser.add_argument("--dense", type=Path, metavar="FOLDER", help="another dense Llama than the demo's origin")
    parser.add_argument("--mixture", type=Path, metavar="FOLDER", help="the Qwen2-MoE checkpoint made of it")
    options = parser.parse_args()
    if (options.dense is None) != (options.mixture is None):
        parser.error("--dense and --mixture go together")
    dense, folder, build_s = pair(options)
    finish({"benchmark": "demo_quality", **measure(dense, folder, options.sequences), "build_s": build_s})


if __name__ == "__main__":
    main()
