"""The written folder, read back by transformers: it is the dense model, with neurons switched off."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from offload_moe.demo.dense import DenseModel
from offload_moe.demo.split import Split
from offload_moe.demo.write import write_checkpoint
from scripts.make_demo.calibrate import calibrate
from scripts.make_demo.distill import distill
from scripts.make_demo.export import to_split
from scripts.make_demo.forward import DenseForward
from scripts.make_demo.layer_split import LayerSplit
from scripts.make_demo.student import Student
from tests.support.demo import TINY_RECIPE, tiny_dense, tiny_split

IDS = torch.randint(3, 320, (8, 32), generator=torch.Generator().manual_seed(1))


def llama(dense: DenseModel) -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**dense.config)).eval()
    missing, unexpected = model.load_state_dict(dense.tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def split_and_load(folder: Path, split: Split | None = None) -> PreTrainedModel:
    write_checkpoint(folder, tiny_dense(), split or tiny_split(), torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


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
    # A zero router weighs all eight exactly alike.
    plain = replace(tiny_split(correction=0.0), router=torch.zeros(2, 8, 32), top_k=8)
    model = split_and_load(tmp_path, plain)
    torch.testing.assert_close(model(IDS).logits, llama(tiny_dense())(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transformers_computes_what_training_meant(tmp_path: Path) -> None:
    """The written checkpoint is the student: masks over the corrected dense weights."""
    dense, split = tiny_dense(), tiny_split()
    splits = []
    for layer in range(2):
        shared, routed = split.members(layer)
        down = dense.tensors[f"model.layers.{layer + 1}.mlp.down_proj.weight"]
        splits.append(LayerSplit(shared=shared, routed=routed, router=split.router[layer], down=down))
    student = Student(dense, splits, TINY_RECIPE)
    for layer, trained in enumerate(student.layers):
        for module, (left, right) in split.corrections.items():
            trained.corrections[f"{module}_left"] = left[layer]
            trained.corrections[f"{module}_right"] = right[layer]
    # The router's weights are 1/4 to about one part in a thousand.
    found = split_and_load(tmp_path, split).model(IDS).last_hidden_state
    torch.testing.assert_close(found, student(IDS), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(found, llama(dense).model(IDS).last_hidden_state, rtol=2e-2, atol=2e-2)


def test_training_brings_the_student_nearer_to_the_dense_model(tmp_path: Path) -> None:
    dense = tiny_dense()
    student = Student(dense, calibrate(dense, IDS, TINY_RECIPE, lambda finished: None), TINY_RECIPE)
    divergences: list[float] = []
    distill(student, dense, IDS, TINY_RECIPE, lambda step, divergence: divergences.append(divergence))
    assert sum(divergences[-4:]) < 0.8 * sum(divergences[:4])
    exported = to_split(student, IDS, TINY_RECIPE)
    model = split_and_load(tmp_path, exported)
    with torch.no_grad():
        found, meant = model.model(IDS).last_hidden_state, student(IDS)
    # Rounded to bf16, a router chooses another expert for a few tokens in a hundred.
    assert (found - meant).norm() < 0.1 * meant.norm()


def test_the_folder_has_the_names_of_real_qwen2_moe_checkpoints(tmp_path: Path) -> None:
    model = split_and_load(tmp_path)
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
