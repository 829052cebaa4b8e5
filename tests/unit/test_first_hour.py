"""What goes wrong in the first hour on a real card, with fake cards: see docs/first-hour.md."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from offload_moe.engine.overflow import watch_overflow
from offload_moe.errors import BudgetError, ConfigError
from offload_moe.memory import copier
from offload_moe.memory.nvidia import Nvidia
from offload_moe.memory.unused_card import notice_of_unused_card
from offload_moe.plan import fit
from offload_moe.plan.machine import compute_dtype, default_dtype

CUDA = torch.device("cuda:0")
CARD = Nvidia(driver="580.1", name="NVIDIA GeForce RTX 3060")
GIB = 1 << 30


def test_a_cpu_build_of_torch_beside_a_card_is_loud_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("offload_moe.memory.unused_card.build_of_torch", lambda: None)
    monkeypatch.setattr("offload_moe.memory.unused_card.platform.system", lambda: "Linux")
    release = torch.__version__.partition("+")[0]
    notice = notice_of_unused_card(CARD)
    assert notice is not None
    assert notice.startswith("NVIDIA GeForce RTX 3060 is not used. This torch cannot use the GPU.")
    assert f'python -m pip install --force-reinstall "torch=={release}"' in notice


def test_a_hidden_card_or_none_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.memory.unused_card.find_nvidia", lambda: None)
    assert notice_of_unused_card() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert notice_of_unused_card(CARD) is None


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_cards_without_bf16_compute_in_fp16(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert default_dtype(CUDA) == expected
    assert compute_dtype("fp32", CUDA) == torch.float32
    assert default_dtype(torch.device("cpu")) == torch.float32


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no dtype 'fp8' .* fp32, bf16, fp16"):
        compute_dtype("fp8", CUDA)


def test_fp16_that_overflows_stops_with_a_message() -> None:
    head = nn.Linear(2, 4, bias=False, dtype=torch.float16)
    head.weight.data.fill_(300.0)
    watch_overflow(SimpleNamespace(get_output_embeddings=lambda: head))
    fine = head(torch.ones(1, 3, 2, dtype=torch.float16))
    assert bool(torch.isfinite(fine).all())
    with pytest.raises(ConfigError, match=r"left the range of fp16 .*--dtype fp32"):
        head(torch.full((1, 3, 2), 300.0, dtype=torch.float16))


def fake_memory(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    monkeypatch.setattr(copier, "_memory_info", lambda _: (free, total))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _: 0)


def test_memory_that_another_process_took_is_not_planned_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_memory(monkeypatch, 4 * GIB, 12 * GIB)
    machine = fit.measure_load(CUDA, vram=None, ram=8 * GIB, dtype=torch.bfloat16)
    assert machine.vram_bytes == int(0.9 * 4 * GIB)
    with pytest.raises(BudgetError, match=r"--vram is 10.0 GiB .* 4.0 GiB free: 8.0 GiB is used .* at most 4.0GiB"):
        fit.measure_load(CUDA, vram=10 * GIB, ram=8 * GIB, dtype=torch.bfloat16)
    assert fit.measure_load(CUDA, vram=3 * GIB, ram=8 * GIB, dtype=torch.bfloat16).vram_bytes == 3 * GIB
