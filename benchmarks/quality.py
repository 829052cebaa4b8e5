"""What formats of weights cost: perplexity over that of the unquantized weights, KL divergence and top-1 agreement.

    python benchmarks/quality.py [smollm2 | demo | CHECKPOINT] [--linears] [--tokens 4096] [--formats NAME,...]

`smollm2` quantizes every linear of SmolLM2-135M-Instruct, the demo's dense origin, but its head; `demo` and another
checkpoint their routed experts, and with `--linears` their dense projections too. Weights are quantized, decoded and
computed in fp32 by transformers, so that formats differ in their weights alone. Texts: topics of the Python reference
and `heldout.txt`, half of each. `calibrated` reads the built-in text of `quantize --calibrate auto`. HQQ needs the
package `hqq` and is left out without it. The last line of stdout is one JSON document.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from harness import finish
from torch import Tensor

from offload_moe import demo
from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.convert.calibration import Calibration
from offload_moe.convert.calibration_text import read_calibration_text
from offload_moe.convert.inputs_folder import InputsFolder
from offload_moe.convert.jobs import linear_shapes
from offload_moe.native.kernels import fast_encoding
from offload_moe.quant import ABSMAX, LEAST_ERROR, get_codec
from offload_moe.quant.layout import weight_shape
from offload_moe.system.progress import silent

HELD_OUT = Path(__file__).with_name("heldout.txt")
Moments = Callable[[], Tensor | None]  # of the inputs of a matrix, made when they are needed
RoundTrip = Callable[[Tensor, Moments], tuple[Tensor, int]]  # weight, moments -> decoded, bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix ``[O, K]`` inside a parameter, and the moments of its inputs."""

    weight: Tensor
    moments: Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    model: Any
    tokenizer: Any
    matrices: list[Matrix]


def of_codec(name: str, scales: str, weighs: Callable[[Tensor], Tensor] | None = None) -> RoundTrip:
    """weighs: the moments that the encoder is given."""

    def round_trip(weight: Tensor, moments: Moments) -> tuple[Tensor, int]:
        shape = weight_shape(*weight.shape)
        found = moments() if weighs is not None else None
        given = {"weight": weighs(found)} if weighs is not None and found is not None else {}
        codec = fast_encoding(get_codec(name), scales, given)
        record = codec.encode(shape, {"weight": weight})
        return get_codec(name).decode(shape, record, torch.float32)["weight"], codec.layout(shape).num_bytes

    return round_trip


def of_gguf(name: str) -> RoundTrip:
    def round_trip(weight: Tensor, moments: Moments) -> tuple[Tensor, int]:
        import gguf

        kind = gguf.GGMLQuantizationType[name]
        data = gguf.quants.quantize(weight.numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(data, kind)), data.nbytes

    return round_trip


def by_bitsandbytes(weight: Tensor, moments: Moments) -> tuple[Tensor, int]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # Flat: bitsandbytes 0.50.2 decodes on a CPU rows that blocks do not divide with an error of 40%.
    packed, state = quantize_4bit(weight.flatten(), blocksize=64, compress_statistics=True, quant_type="nf4")
    num_scales = -(-weight.numel() // 64)
    num_bytes = packed.numel() + num_scales + 4 * -(-num_scales // 256) + 4
    return dequantize_4bit(packed, state).view_as(weight), num_bytes


def by_hqq(weight: Tensor, moments: Moments) -> tuple[Tensor, int]:
    """Groups of 64 along a row, an fp16 scale and zero each; of 32 where a row is not longer."""
    quantizer = import_module("hqq.core.quantize").Quantizer
    group = 64 if weight.shape[1] % 64 == 0 else 32
    settings = {"nbits": 4, "group_size": group, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
    packed, meta = quantizer.quantize(weight.clone(), **settings)
    return quantizer.dequantize(packed, meta), weight.numel() // 2 + 4 * weight.numel() // group


FORMATS: dict[str, RoundTrip] = {
    "nf4-absmax": of_codec("nf4", ABSMAX),
    "nf4": of_codec("nf4", LEAST_ERROR),
    "nf4-importances": of_codec("nf4", LEAST_ERROR, lambda moments: moments.diagonal()),
    "nf4-calibrated": of_codec("nf4", LEAST_ERROR, lambda moments: moments),
    "int8": of_codec("int8", LEAST_ERROR),
    "Q4_0": of_gguf("Q4_0"),
    "Q4_1": of_gguf("Q4_1"),
    "Q8_0": of_gguf("Q8_0"),
    "bitsandbytes-nf4": by_bitsandbytes,
    "HQQ": by_hqq,
}


def held_out(tokenizer: Any, num_tokens: int, length: int) -> Tensor:
    """``[S, length]``: topics of the reference, then the text beside this file."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    reference: list[int] = []
    for name in sorted(topics)[::5]:
        reference += tokenizer(topics[name]).input_ids[:length]
    prose: list[int] = tokenizer(HELD_OUT.read_text(encoding="utf-8")).input_ids
    rows = []
    for ids in (reference, prose):
        count = min(num_tokens // 2, len(ids)) // length
        rows.append(torch.tensor(ids[: count * length]).view(count, length))
    return torch.cat(rows)


def smollm2() -> Subject:
    """The dense model, and the products of every linear's inputs on the built-in text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from offload_moe.checkpoint.tokenizer import load_tokenizer
    from offload_moe.demo.source import fetch_dense
    from offload_moe.system import paths

    dense = fetch_dense(paths.cache_dir() / "downloads", silent)
    model = LlamaForCausalLM(LlamaConfig(**dense.config)).eval()
    model.load_state_dict({name: value.bfloat16() for name, value in dense.tensors.items()}, strict=False)
    folder = demo.checkpoint()
    tokenizer = load_tokenizer(folder)[0]
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    products = _products(model, linears, read_calibration_text("auto", folder).ids)
    matrices = [
        Matrix(weight=module.weight.data, moments=lambda name=name: products[name]) for name, module in linears.items()
    ]
    return Subject(model=model, tokenizer=tokenizer, matrices=matrices)


def _products(model: Any, linears: Mapping[str, Any], ids: Tensor) -> dict[str, Tensor]:
    products: dict[str, Tensor] = {}

    def of(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(module: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            products[name] = products.get(name, 0) + rows.T @ rows / ids.numel()

        return add

    hooks = [module.register_forward_pre_hook(of(name)) for name, module in linears.items()]
    for batch in ids.split(4):
        model.model(batch)
    for hook in hooks:
        hook.remove()
    return products


def mixture(folder: Path, inputs: Path, *, with_linears: bool) -> Subject:
    """A checkpoint with experts, calibrated as `quantize --calibrate auto` does it."""
    from transformers import AutoModelForCausalLM

    from offload_moe.checkpoint.tokenizer import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = Checkpoint(folder)
    linears = tuple(linear_shapes(checkpoint)) if with_linears else ()
    text = read_calibration_text("auto", folder)
    kinds = ["experts", "linears"]
    calibration = Calibration(checkpoint, text, linears, InputsFolder(inputs, silent), feeds_back=kinds)
    calibration.prepare({})
    matrices = [*_experts(model, checkpoint, calibration)]
    for name in linears:
        module = model.get_submodule(name)
        matrices.append(
            Matrix(weight=module.weight.data, moments=lambda name=name: calibration.of_linear(name).get("weight"))
        )
    return Subject(model=model, tokenizer=load_tokenizer(folder)[0], matrices=matrices)


def _experts(model: Any, checkpoint: Checkpoint, calibration: Calibration) -> Iterator[Matrix]:
    for ordinal, layer in enumerate(checkpoint.layers):
        module = model.get_submodule(layer.name)
        for expert in range(layer.num_experts):
            tensors = checkpoint.expert(ordinal, expert)
            for matrix in layer.shape.matrices:

                def moments(
                    ordinal: Any = ordinal, expert: Any = expert, tensors: Any = tensors, of: Any = matrix
                ) -> Any:
                    return calibration.of_expert(ordinal, expert, tensors).get(of.name)

                yield Matrix(weight=getattr(module, matrix.name).data[expert], moments=moments)


class Reference:
    """The unquantized model's distributions on a text."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        self._expected = list(self._rows())

    def _rows(self) -> Iterator[Tensor]:
        for row in self._ids.split(1):
            yield self._model(row, use_cache=False).logits[0, :-1].float().log_softmax(-1)

    def perplexity(self) -> float:
        return math.exp(self._loss(self._expected) / self._ids[:, 1:].numel())

    def compare(self) -> dict[str, float]:
        """Of the model as it is now: perplexity over the reference's, mean KL divergence, share of equal top tokens."""
        divergence = same = loss = 0.0
        for index, (found, expected) in enumerate(zip(self._rows(), self._expected, strict=True)):
            divergence += float((expected.exp() * (expected - found)).sum())
            same += float((expected.argmax(-1) == found.argmax(-1)).sum())
            loss += self._loss([found], index)
        count = self._ids[:, 1:].numel()
        return {
            "perplexity_ratio": math.exp((loss - self._loss(self._expected)) / count),
            "kl_divergence": divergence / count,
            "top1_agreement": same / count,
        }

    def _loss(self, rows: list[Tensor], first: int = 0) -> float:
        targets = self._ids[first : first + len(rows), 1:]
        return sum(-float(row.gather(-1, ids[:, None]).sum()) for row, ids in zip(rows, targets, strict=True))


def quantize_all(subject: Subject, originals: list[Tensor], round_trip: RoundTrip) -> dict[str, float]:
    """Replace every matrix. Returns bits per weight, and the seconds that it took."""
    begun_s, num_bytes = time.perf_counter(), 0
    for matrix, original in zip(subject.matrices, originals, strict=True):
        decoded, size = round_trip(original, matrix.moments)
        matrix.weight.copy_(decoded)
        num_bytes += size
    bits = 8 * num_bytes / sum(original.numel() for original in originals)
    return {"bits_per_weight": bits, "quantize_s": time.perf_counter() - begun_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", nargs="?", default="smollm2")
    parser.add_argument("--linears", action="store_true", help="quantize dense projections of a mixture too")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as scratch:
        if options.subject == "smollm2":
            subject = smollm2()
        else:
            folder = demo.checkpoint() if options.subject == "demo" else Path(options.subject)
            subject = mixture(folder, Path(scratch) / "inputs", with_linears=options.linears)
        ids = held_out(subject.tokenizer, options.tokens, options.length)
        reference = Reference(subject.model, ids)
        originals = [matrix.weight.clone() for matrix in subject.matrices]
        rows = []
        for name in options.formats.split(","):
            if name == "HQQ" and find_spec("hqq") is None:
                continue
            sizes = quantize_all(subject, originals, FORMATS[name])
            rows.append({"format": name, **sizes, **reference.compare()})
            print(rows[-1], file=sys.stderr, flush=True)
    finish(
        {
            "benchmark": "quality",
            "subject": options.subject if options.subject in ("smollm2", "demo") else Path(options.subject).name,
            "linears": options.linears or options.subject == "smollm2",
            "tokens": ids.numel(),
            "length": options.length,
            "perplexity": reference.perplexity(),
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()
