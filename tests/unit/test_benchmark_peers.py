"""The peers of `benchmarks/decode_cpu.py`: the files that are written for them, and the build that they must be."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.support.benchmarks import BENCHMARKS

SHRUNK: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B-0125": {"num_hidden_layers": 2, "num_experts": 8, "intermediate_size": 64},
    "Qwen3-30B-A3B": {"num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 64, "head_dim": 32},
    "Mixtral-8x7B-v0.1": {"num_hidden_layers": 2, "intermediate_size": 64},
    "DeepSeek-V2-Lite": {"n_routed_experts": 8, "moe_intermediate_size": 64, "intermediate_size": 64},
    "gpt-oss-20b": {"num_hidden_layers": 2, "num_local_experts": 8, "intermediate_size": 64, "head_dim": 32},
}
EVERYWHERE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (BENCHMARKS / "peers", BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((BENCHMARKS / "configs" / f"{name}.json").read_text())
    return config


def shapes() -> ModuleType:
    return import_module("gguf_shapes")


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("OLMoE-1B-7B-0125", 6.92),
        ("Qwen3-30B-A3B", 30.53),
        ("Mixtral-8x7B-v0.1", 46.70),
        ("DeepSeek-V2-Lite", 15.71),
        ("gpt-oss-20b", 20.91),
    ],
)
def test_a_file_has_as_many_weights_as_the_published_model(name: str, billions: float) -> None:
    model = shapes().model_of(config_of(name))
    num_weights = sum(math.prod(tensor.shape) for tensor in model.tensors)
    assert round(num_weights / 1e9, 2) == billions


@pytest.mark.usefixtures("peers")
def test_deepseek_is_written_only_as_llamacpp_reads_it() -> None:
    with pytest.raises(ValueError, match="27 layers"):
        shapes().model_of(config_of("DeepSeek-V2-Lite") | {"num_hidden_layers": 14})
    with pytest.raises(ValueError, match="low-rank"):
        shapes().model_of(config_of("DeepSeek-V2-Lite") | {"q_lora_rank": 1536})


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("name", SHRUNK)
def test_the_bytes_of_a_token_are_those_in_the_file(name: str, tmp_path: Path) -> None:
    config = config_of(name) | EVERYWHERE | SHRUNK[name]
    model = shapes().model_of(config)
    import_module("make_random_gguf").RandomGguf(tmp_path / "model.gguf", model, "Q4_0").write()
    sizes = import_module("token_bytes").of_gguf(tmp_path / "model.gguf", config)
    block_bytes = 17 if name.startswith("gpt") else 18  # 16 of codes, and a scale of one byte (MXFP4) or two (Q4_0)
    num_experts = next(tensor.shape[0] for tensor in model.tensors if tensor.kind == "expert")
    experts = [tensor for tensor in model.tensors if "_exps." in tensor.name]
    dense = [tensor for tensor in model.tensors[1:] if "_exps." not in tensor.name]  # the first is the embedding
    used = config["num_experts_per_tok"] / num_experts
    assert sizes["experts"] == used * sum(num_bytes(tensor, block_bytes) for tensor in experts)
    assert sizes["dense"] == sum(num_bytes(tensor, 18) for tensor in dense)


def num_bytes(tensor: Any, block_bytes: int) -> int:
    """Of its weights, 32 to a block, or of fp32."""
    is_quantized = tensor.kind in ("expert", "dense")
    return math.prod(tensor.shape) // 32 * block_bytes if is_quantized else 4 * math.prod(tensor.shape)


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_random_weights_have_their_spread_and_no_mean(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    pool = import_module("make_random_gguf").BlockPool(kind, np.random.default_rng(0))
    blocks = pool.take(1 << 18, 0.02).reshape(-1, pool.block_bytes)
    weights = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert weights.std() == pytest.approx(0.02, rel=0.35 if kind == "MXFP4" else 0.05)  # its scales are powers of two
    assert abs(weights.mean()) < 0.07 * weights.std()


@pytest.mark.usefixtures("peers")
def test_the_mixture_is_llamacpps() -> None:
    model = shapes().model_of(config_of("OLMoE-1B-7B-0125"))
    types = {
        each.name: import_module("peers.gguf_mixture").matrix_type("Q4_K_M", model, each) for each in model.tensors
    }
    better = [layer for layer in range(16) if types[f"blk.{layer}.ffn_down_exps.weight"] == "Q6_K"]
    assert better == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {types[f"blk.{layer}.attn_v.weight"] for layer in better} == {"Q6_K"}
    assert (types["blk.0.ffn_up_exps.weight"], types["output.weight"]) == ("Q4_K", "Q6_K")
    assert (types["token_embd.weight"], types["blk.0.ffn_gate_inp.weight"]) == ("Q4_K", "F32")


@pytest.mark.usefixtures("peers")
def test_rows_of_no_whole_superblocks_have_other_types() -> None:
    model = shapes().model_of(config_of("DeepSeek-V2-Lite"))
    types = {
        each.name: import_module("peers.gguf_mixture").matrix_type("Q4_K_M", model, each) for each in model.tensors
    }
    assert {types[f"blk.{layer}.ffn_down_exps.weight"] for layer in range(1, 27)} == {"Q5_0", "Q8_0"}


X86 = "processor : 0\nflags\t\t: fpu avx avx2 fma f16c bmi2 avx512f avx512vbmi avx512_vnni\n"
OLDER = "AVX = 1 | AVX2 = 1 | FMA = 1 | F16C = 1 | BMI2 = 1 | "
NEWER = OLDER + "AVX512 = 1 | AVX512_VBMI = 1 | AVX512_VNNI = 1 | "
ARM = "processor : 0\nFeatures\t: fp asimd asimddp i8mm\n"


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize(
    ("cpuinfo", "info", "missing"),
    [
        (X86, OLDER, ["AVX512", "AVX512_VBMI", "AVX512_VNNI"]),
        (X86, NEWER, []),
        (X86, NEWER.replace("AVX2 = 1", "AVX2 = 0"), ["AVX2"]),
        (ARM, "CPU : NEON = 1 | DOTPROD = 1 | ", ["MATMUL_INT8"]),
    ],
)
def test_a_build_for_another_processor_is_told_from_one_for_this(cpuinfo: str, info: str, missing: list[str]) -> None:
    assert import_module("llamacpp_native").missing_instructions(info, cpuinfo) == missing


ECHO = """
import sys
sys.path.insert(0, {benchmarks!r})
from live import Answers

class Echo:
    def say(self, *, word):
        print("a library writes here too")
        if word == "stop":
            raise ValueError("no more")
        return {{"word": word}}

Answers().serve(Echo(), {{"load_s": 1.5}})
"""


@pytest.mark.usefixtures("peers")
def test_a_live_process_answers_until_it_ends(tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(benchmarks=str(BENCHMARKS)))
    with import_module("live").Live([sys.executable, str(script)]) as process:
        assert process.loaded == {"load_s": 1.5}
        assert [process.ask("say", word=word)["word"] for word in ("one", "two")] == ["one", "two"]
        with pytest.raises(RuntimeError, match="no more"):
            process.ask("say", word="stop")
