"""Memory of a conversion is bounded by a few experts, not by a layer, even where a layer is one fused tensor."""

from pathlib import Path

import psutil
import pytest

from offload_moe.quantize import Progress, quantize
from tests.support.checkpoints import write_checkpoint


@pytest.mark.filterwarnings("ignore")
def test_resident_memory_stays_within_a_few_experts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "warm", "gpt_oss")
    quantize(tmp_path / "warm", tmp_path / "warm-store", codec="bf16")
    size = {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 64, "num_hidden_layers": 2}
    write_checkpoint(tmp_path / "model", "gpt_oss", shard_size="1GB", **size)
    expert_bytes = 3 * 512 * 512 * 2
    process = psutil.Process()
    before = process.memory_info().rss
    growth: list[int] = []

    def report(progress: Progress) -> None:
        growth.append(process.memory_info().rss - before)

    quantize(tmp_path / "model", tmp_path / "store", codec="bf16", progress=report)
    assert max(growth) < 20 * expert_bytes, "a layer has 64 experts in one tensor"
