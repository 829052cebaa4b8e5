"""The written folder, read back by transformers: it is the dense model, with neurons switched off."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from offload_moe.demo.calibrate import calibrate
from offload_moe.demo.dense import DenseModel
from offload_moe.demo.forward import DenseForward
from offload_moe.demo.router import top_k_mask
from offload_moe.demo.write import LayerSplit, write_checkpoint
from tests.support.demo import TINY_RECIPE, tiny_dense

IDS = torch.randint(3, 320, (8, 32), generator=torch.Generator().manual_seed(1))


def llama(dense: DenseModel) -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**dense.config)).eval()
    missing, unexpected = model.load_state_dict(dense.tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def split_and_load(folder: Path) -> tuple[DenseModel, list[LayerSplit], PreTrainedModel]:
    dense = tiny_dense()
    splits = calibrate(dense, IDS, TINY_RECIPE, lambda finished: None)
    write_checkpoint(folder, dense, splits, TINY_RECIPE.top_k, torch.float32)
    return dense, splits, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_the_forward_pass_of_calibration_is_llama() -> None:
    dense = tiny_dense()
    forward = DenseForward(dense, IDS.shape[1])
    hidden = forward.embed(IDS)
    expected = llama(dense).model(IDS, output_hidden_states=True).hidden_states
    for layer in range(3):
        torch.testing.assert_close(hidden, expected[layer], rtol=1e-5, atol=1e-5)
        hidden = forward.attend(layer, hidden)
        neurons = forward.activations(layer, forward.feed_forward_input(layer, hidden))
        hidden = hidden + neurons @ forward.weight(layer, "mlp.down_proj").T


@torch.no_grad()
def test_with_every_expert_active_the_logits_are_the_dense_models(tmp_path: Path) -> None:
    dense = tiny_dense()
    splits = calibrate(dense, IDS, TINY_RECIPE, lambda finished: None)
    # A zero router weighs all eight exactly alike.
    plain = [
        replace(split, router=torch.zeros(8, 32), down=dense.tensors[f"model.layers.{layer + 1}.mlp.down_proj.weight"])
        for layer, split in enumerate(splits)
    ]
    write_checkpoint(tmp_path, dense, plain, 8, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(model(IDS).logits, llama(dense)(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transformers_computes_what_calibration_meant(tmp_path: Path) -> None:
    dense, splits, model = split_and_load(tmp_path)
    forward = DenseForward(dense, IDS.shape[1])
    hidden = forward.embed(IDS)
    hidden = forward.attend(0, hidden)
    neurons = forward.activations(0, forward.feed_forward_input(0, hidden))
    hidden = hidden + neurons @ forward.weight(0, "mlp.down_proj").T
    for layer, split in enumerate(splits, start=1):
        hidden = forward.attend(layer, hidden)
        normed = forward.feed_forward_input(layer, hidden)
        chosen = top_k_mask((normed @ split.router.T).flatten(0, 1), 4).view(*IDS.shape, 8)
        active = torch.zeros(*IDS.shape, 48)
        active[..., split.shared] = 1
        for expert, neurons in enumerate(split.routed):
            active[..., neurons] = chosen[..., expert : expert + 1]
        assert active.mean() == pytest.approx((16 + 4 * 4) / 48)
        hidden = hidden + (forward.activations(layer, normed) * active) @ split.down.T
    # The router's weights are 1/4 to about one part in a thousand.
    found = model.model(IDS).last_hidden_state
    torch.testing.assert_close(found, model.model.norm(hidden), rtol=2e-2, atol=2e-2)


def test_the_folder_has_the_names_of_real_qwen2_moe_checkpoints(tmp_path: Path) -> None:
    _, _, model = split_and_load(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.2.mlp.experts.7.gate_proj.weight" in names
    assert "model.layers.1.mlp.shared_expert.down_proj.weight" in names
    assert "model.layers.0.mlp.down_proj.weight" in names, "the first layer stays dense"
    assert model.config.model_type == "qwen2_moe"
    assert model.generation_config.eos_token_id == 2


def test_the_tokenizer_has_its_chat_template_and_stop_token(tmp_path: Path) -> None:
    split_and_load(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Grüß 12"}], tokenize=False)
    assert text == "<|im_start|>Grüß 12<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Grüß 12"
