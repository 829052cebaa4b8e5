"""Memory of a conversion is bounded by a few experts, not by a layer or the largest tensor."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from offload_moe.convert.quantize import quantize
from offload_moe.store import Store
from tests.support.checkpoints import write_checkpoint
from tests.support.gguf_models import write_model

VOCABULARY, HIDDEN = 1 << 16, 1024
# Quantizes a small checkpoint first, then measures how far the peak rises above that, once per dense codec.
MEASURE = """
import json, sys
from pathlib import Path
import bitsandbytes  # imported late otherwise
from offload_moe.convert.quantize import quantize

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

folder, growth = Path(sys.argv[1]), {}
for codec in sys.argv[2:]:
    quantize(folder / "warm", folder / f"warm-{codec}", dense_codec=codec)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    quantize(folder / "model", folder / codec, dense_codec=codec)
    growth[codec] = status("VmHWM") - before
print(json.dumps(growth))
"""

MEASURE_GGUF = (
    MEASURE.partition("folder, growth")[0]
    + """
folder = Path(sys.argv[1])
quantize(folder / "warm.gguf", folder / "warm-store")
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
quantize(folder / "model.gguf", folder / "store")
print(status("VmHWM") - before)
"""
)


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

    def report(phase: str, done: float = -1.0, total: float | None = None) -> None:
        growth.append(process.memory_info().rss - before)

    quantize(tmp_path / "model", tmp_path / "store", codec="bf16", progress=report)
    assert max(growth) < 20 * expert_bytes, "a layer has 64 experts in one tensor"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux' /proc")
@pytest.mark.parametrize("codecs", [("bf16", "int8"), pytest.param(("nf4",), marks=pytest.mark.slow)])
def test_the_peak_stays_below_an_embedding_and_a_head(codecs: tuple[str, ...], tmp_path: Path) -> None:
    """Both are copied, or encoded, by rows: one of them in bf16 is already more than what is allowed."""
    write_checkpoint(tmp_path / "warm")
    size = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 1}
    write_checkpoint(tmp_path / "model", shard_size="1GB", **size)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), *codecs]
    output = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    tensor_bytes = 2 * VOCABULARY * HIDDEN
    grown = json.loads(output.splitlines()[-1])
    assert tuple(grown) == codecs
    for codec, growth in grown.items():
        store = Store.open(tmp_path / codec)
        assert store.dense["model.embed_tokens.weight"].place.num_bytes == tensor_bytes
        assert (store.dense["lm_head.weight"].quantized is None) == (codec == "bf16")
        assert growth < tensor_bytes, codec


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux' /proc")
def test_a_gguf_file_is_copied_by_groups_of_rows(tmp_path: Path) -> None:
    """Its embedding stays in rows, its head goes into panels; each was in memory three times."""
    write_model(tmp_path / "warm", "qwen3_moe")
    size = {"vocab_size": 4 * VOCABULARY, "num_hidden_layers": 1}
    write_model(tmp_path / "model", "qwen3_moe", **size)
    for name in ("warm", "model"):
        (tmp_path / name / "model.gguf").rename(tmp_path / f"{name}.gguf")
    command = [sys.executable, "-c", MEASURE_GGUF, str(tmp_path)]
    output = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    dense = Store.open(tmp_path / "store").dense
    sizes = [dense[name].place.num_bytes for name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert int(output.splitlines()[-1]) < sum(sizes), sizes
