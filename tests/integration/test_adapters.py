"""What is special to families outside transformers' registry; that they give eager's bits is in test_families.py."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import tiny_config, write_checkpoint
from support.families import PROMPT, both, eager_model, prompt_and_decode, spoil_one_record
from transformers import AutoModelForImageTextToText

from offload_moe import load
from offload_moe.families import ADAPTERS, find_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))


def route_as_trained(nllb: Any) -> None:
    """Give NLLB's eager experts a list of ids instead of a mask, which is all that upstream gets wrong."""
    for module in nllb.modules():
        if type(module).__name__ == "NllbMoeExperts":
            eager = module.forward
            module.forward = lambda hidden, _, probs, eager=eager: eager(hidden, *probs.topk(2, dim=-1)[::-1])


def test_nllb_gives_the_bits_of_eager_once_that_routes_as_trained(tmp_path: Path) -> None:
    with both(tmp_path, "nllb-moe") as (model, oracle):
        route_as_trained(oracle)
        expected = prompt_and_decode(oracle)
        assert expected.abs().max() > 1e-3
        assert torch.equal(prompt_and_decode(model.hf), expected)
        spoil_one_record(model)
        assert not torch.equal(prompt_and_decode(model.hf), expected)


def test_upstream_still_sends_every_token_of_nllb_to_two_experts(tmp_path: Path) -> None:
    """Once this fails, eager itself is the oracle again: move nllb-moe to the other families and drop the note."""
    write_checkpoint(tmp_path, "nllb-moe")
    oracle = eager_model(tmp_path)
    before = prompt_and_decode(oracle)
    for module in oracle.modules():
        if type(module).__name__ == "NllbMoeExperts":
            for expert in ("expert_2", "expert_3"):
                module[expert].fc2.weight.data.zero_()
    assert torch.equal(prompt_and_decode(oracle), before)


def test_switch_drops_tokens_beyond_the_capacity(tmp_path: Path) -> None:
    with both(tmp_path, "switch_transformers") as (model, _):
        kept: list[int] = []
        router = next(m for m in model.hf.modules() if type(m).__name__ == "SwitchTransformersTop1Router")
        router.register_forward_hook(lambda module, args, out: kept.append(int(out[0].sum())))
        prompt_and_decode(model.hf)
        assert 0 < kept[0] < PROMPT.numel()


def test_llama4_writes_text_from_the_multimodal_checkpoint(tmp_path: Path) -> None:
    """Its images' tensors are skipped with a word."""
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(tiny_config("llama4"), dtype=torch.bfloat16)
    for name, tensor in whole.state_dict().items():
        if "inv_freq" not in name:
            tensor.copy_(torch.randn(tensor.shape) * 0.1)
    whole.save_pretrained(tmp_path / "checkpoint")
    # Of the whole model, which transformers 5.24 cannot run.
    oracle = type(whole).from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval().language_model
    said: list[str] = []
    with load(tmp_path / "checkpoint", codec="bf16", progress=lambda phase, *_: said.append(phase)) as model:
        assert torch.equal(prompt_and_decode(model.hf), prompt_and_decode(oracle))
    assert any("vision" in phase or "multi_modal" in phase for phase in said)


def test_longcat_is_read_as_it_is_published(tmp_path: Path) -> None:
    """There the zero-compute experts have no tensors; transformers saves rows for them that nothing reads."""
    write_checkpoint(tmp_path / "saved", "longcat_flash", shard_size="1GB")
    oracle = eager_model(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    spare = [name for name in tensors if ".experts.4." in name or ".experts.5." in name]
    assert spare
    save_file({n: t for n, t in tensors.items() if n not in spare}, path, metadata={"format": "pt"})
    with load(tmp_path / "saved", codec="bf16") as model:
        assert torch.equal(prompt_and_decode(model.hf), prompt_and_decode(oracle))


@pytest.mark.parametrize(
    "family", ["dbrx", "jetmoe", "llama4_text", "longcat_flash", "nllb-moe", "switch_transformers"]
)
def test_quantized_experts_stay_close(family: str, tmp_path: Path) -> None:
    """Through the native kernels where there are any."""
    write_checkpoint(tmp_path / "checkpoint", family)
    oracle = eager_model(tmp_path / "checkpoint")
    route_as_trained(oracle)
    with load(tmp_path / "checkpoint", codec="int8", dense_codec="bf16") as model, torch.inference_mode():
        inputs = {"decoder_input_ids": PROMPT[:, :4]} if oracle.config.is_encoder_decoder else {}
        got, expected = model.hf(input_ids=PROMPT, **inputs).logits, oracle(input_ids=PROMPT, **inputs).logits
        assert 0 < (got - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
def test_encoder_decoders_generate(family: str, tmp_path: Path) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with both(tmp_path, family) as (model, oracle):
        route_as_trained(oracle)
        expected = oracle.generate(PROMPT, **settings)
        assert expected.shape == (2, 9)
        assert torch.equal(model.hf.generate(PROMPT, **settings), expected)


def test_every_adapter_finds_its_class() -> None:
    for adapter in ADAPTERS:
        module = importlib.import_module(f"transformers.models.{adapter.family}.modeling_{adapter.family}")
        kind = getattr(module, adapter.class_name)
        assert find_adapter(kind.__new__(kind)) is adapter
        assert all(hasattr(module, name) for name in adapter.left_alone)
    assert find_adapter(torch.nn.Identity()) is None
