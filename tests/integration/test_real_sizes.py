"""`benchmarks/real_sizes.py` on every shape it knows, shrunk: names, formats and layers stay, widths do not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONFIGS = sorted(path.stem for path in (BENCHMARKS / "configs").glob("*.json"))
WHOLE = ("OLMoE-1B-7B-0125", "DeepSeek-V2-Lite", "Qwen3-30B-A3B")
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "d_model": 128,
    "d_ff": 96,
    "d_kv": 32,
    "num_heads": 4,
    "num_hidden_layers": 3,
}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The vocabulary and what a format says stay."""
    return {
        key: shrink(value) if key == "text_config" else SMALL[key] if key in SMALL and value is not None else value
        for key, value in config.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_runs_from_its_config_to_tokens(name: str, tmp_path: Path) -> None:
    config = json.loads((BENCHMARKS / "configs" / f"{name}.json").read_text())
    (tmp_path / f"{name}.json").write_text(json.dumps(shrink(config)))
    command = [sys.executable, str(BENCHMARKS / "real_sizes.py"), str(tmp_path / "scratch"), name]
    flags = ["--configs", str(tmp_path), *(["--whole"] if name in WHOLE else [])]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["models"][name]
    assert found["quantize"]["is_within_limit"]
    assert found["quantize"]["num_experts"] >= 16
    assert found["quantize"]["codec"] == ("mxfp4" if "gpt-oss" in name else "nf4")
    assert found["run"]["runs"][0]["decode_tokens_per_s"] > 0
    assert not list((tmp_path / "scratch").iterdir())
