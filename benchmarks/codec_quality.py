"""Quality of the demo, or of another model, per codec, with exact and with int8 activations: what speed costs.

    python benchmarks/codec_quality.py [MODEL] [--tokens 2048] [--length 256]

Texts come with Python: language reference topics, which the demo's calibration did not see. The prompt's path is
measured (chunks of `--length` tokens at once); experts in bf16 give eager's own numbers, and KL divergence and top-1
agreement are with them. `quality.py` compares formats of weights alone. The last line of stdout is one JSON document.
"""

import argparse
import math
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from harness import finish

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

# Experts' codec, its scales (by "calibrated" with `calibrate="auto"`), dense codec, exact activations.
CANDIDATES: tuple[tuple[str, str, str | None, bool], ...] = (
    ("bf16", "error", None, False),
    ("int8", "absmax", "bf16", True),
    ("int8", "error", "bf16", True),
    ("int8", "error", None, False),
    ("nf4", "absmax", "bf16", True),
    ("nf4", "error", "bf16", True),
    ("nf4", "calibrated", "bf16", True),
    ("nf4", "error", "bf16", False),
    ("nf4", "error", None, False),
    ("nf4", "absmax", "nf4", False),
    ("nf4", "error", "nf4", False),
    ("nf4", "calibrated", "nf4", False),
)


def chunks(tokenizer: Any, num_tokens: int, length: int) -> Any:
    """``[B, length]`` of topics that are spread over the reference."""
    import torch

    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    ids: list[int] = []
    for name in sorted(topics)[::5]:
        ids += tokenizer(topics[name]).input_ids[:length]
    return torch.tensor(ids[: min(num_tokens, len(ids)) // length * length]).view(-1, length)


class Comparison:
    """Distributions of the next token on a text, against those of the first model that it measures."""

    def __init__(self, ids: Any) -> None:
        self._ids = ids
        self._expected: list[Any] = []

    def measure(self, hf: Any) -> dict[str, float]:
        """Perplexity, mean KL divergence from the first model, and the share of tokens with the same top choice."""
        import torch
        from torch.nn.functional import cross_entropy

        loss = divergence = same = 0.0
        with torch.inference_mode():
            for index, row in enumerate(self._ids.split(1)):
                found = hf(row, use_cache=False).logits[0, :-1].float().log_softmax(-1)
                if index == len(self._expected):
                    self._expected.append(found)
                expected = self._expected[index]
                loss += float(cross_entropy(found, row[0, 1:], reduction="sum"))
                divergence += float((expected.exp() * (expected - found)).sum())
                same += float((expected.argmax(-1) == found.argmax(-1)).sum())
        count = self._ids[:, 1:].numel()
        return {
            "perplexity": math.exp(loss / count),
            "kl_divergence": divergence / count,
            "top1_agreement": same / count,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="a checkpoint with a tokenizer, or a hub id")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    from offload_moe import demo, load, quantize

    source = demo.checkpoint() if options.model == "demo" else options.model
    rows = []
    ids = None
    for codec, scales, dense_codec, is_exact in CANDIDATES:
        with tempfile.TemporaryDirectory() as folder:
            chosen = {"calibrate": "auto"} if scales == "calibrated" else {"scales": scales}
            store = quantize(source, Path(folder) / "store", codec=codec, dense_codec=dense_codec or "bf16", **chosen)
            with load(store, dense_codec=dense_codec, exact=is_exact) as model:
                if ids is None:
                    ids = chunks(model.tokenizer, options.tokens, options.length)
                    comparison = Comparison(ids)
                row = {
                    "experts": codec,
                    "scales": scales,
                    "dense": dense_codec or ("bf16" if codec == "bf16" else "int8 in memory"),
                    "activations": "fp32" if is_exact or codec == "bf16" else "int8",
                    **comparison.measure(model.hf),
                    "dense_bytes": model.memory["dense weights"],
                }
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    assert ids is not None
    names = {"model": options.model, "length": options.length}
    finish({"benchmark": "codec_quality", **names, "tokens": ids.numel(), "rows": rows})


if __name__ == "__main__":
    main()
