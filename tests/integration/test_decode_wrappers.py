"""The fast path inside of larger models: a language model that is given what images become, and an encoder-decoder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import COMMON, VISION, write_checkpoint
from support.models import open_model
from torch import Tensor
from transformers import DynamicCache

from offload_moe.convert.quantize import quantize
from offload_moe.decode.norm import FusedRMSNorm
from offload_moe.decode.plan import PassPlan
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import with_cache
from tests.support.passes import rows_of_calls

NUM_PROMPT, NUM_STEPS = 9, 4
ROUNDING = 2e-2  # int8 activations: a last bit before them may round one of them the other way
SIZES = {"head_dim": 16, "hidden_size": 64}  # that the kernels take
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
IMAGE = slice(2, 6)  # places of a prompt that an image has, two by two


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    """Qwen3-VL-MoE with the fast path and without."""
    root = tmp_path_factory.mktemp("vision")
    text = COMMON | SIZES | {"rope_parameters": ROPE}
    hf: Any = write_checkpoint(root / "checkpoint", "qwen3_vl_moe", text_config=text, vision_config=VISION)
    with torch.no_grad():  # positions change what attention gives, if that counts
        for name, weight in hf.get_decoder().named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            elif name.endswith(("v_proj.weight", "o_proj.weight")):
                weight.mul_(3.0)
    hf.save_pretrained(root / "checkpoint", max_shard_size="40KB")
    store = quantize(root / "checkpoint", root / "store", codec="nf4")
    with open_model(store) as fast, open_model(store, fast_path=False) as plain:
        yield fast, plain


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every pass of a plan."""
    return rows_of_calls(monkeypatch, PassPlan)


def planes(num_planes: int) -> Tensor:
    """Positions ``[planes, 1, T]`` of a prompt with an image: of text, time, height and width."""
    found = torch.arange(NUM_PROMPT).repeat(4, 1)
    found[2, IMAGE] = torch.tensor([2, 2, 3, 3])
    found[3, IMAGE] = torch.tensor([2, 3, 2, 3])
    found[1, IMAGE] = 2
    found[1:, IMAGE.stop :] -= 2
    return found[-num_planes:, None]


def prompt(kind: str) -> dict[str, Any]:
    ids = torch.arange(3, 3 + NUM_PROMPT)[None]
    if kind == "text":
        return {"input_ids": ids}
    if kind == "images":
        is_image = torch.zeros(1, NUM_PROMPT, dtype=torch.bool)
        is_image[:, IMAGE] = True
        features = torch.randn(2, 4, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
        extra = {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(features)}
        return {"input_ids": ids, "position_ids": planes(4)} | extra
    return {"input_ids": ids, "position_ids": planes(int(kind[0]))}


@torch.inference_mode()
def decoded(model: Model, kind: str) -> Tensor:
    """Logits behind a prompt of the language model and of greedy steps, with the positions of the same kind."""
    decoder, head = model.hf.get_decoder(), model.hf.get_output_embeddings()
    given, cache, logits = prompt(kind), DynamicCache(config=decoder.config), list[Tensor]()
    for step in range(NUM_STEPS + 1):
        out = decoder(**given, **with_cache(cache), use_cache=True)
        logits.append(head(out.last_hidden_state[:, -1]))
        given = {"input_ids": logits[-1].argmax(-1)[None]}
        if kind != "text":
            given["position_ids"] = planes(3 if kind[0] == "3" else 4)[..., -1:] + 1 + step
    return torch.cat(logits)


@pytest.mark.parametrize("kind", ["text", "3 planes", "4 planes", "images"])
def test_a_language_model_of_images_decodes_as_its_modules(
    kind: str, models: tuple[Model, Model], passes: list[int]
) -> None:
    got, expected = (decoded(model, kind) for model in models)
    assert passes == [*([] if kind == "images" else [NUM_PROMPT]), *[1] * NUM_STEPS]
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert (got - expected).norm() < ROUNDING * expected.norm()
    if kind != "text":
        assert (expected - decoded(models[1], "text")).norm() > 0.1 * expected.norm()


def test_generate_passes_as_well(models: tuple[Model, Model], passes: list[int]) -> None:
    """Its head is called by a model around the model that has the decoder."""
    got, expected = (generated(model) for model in models)
    assert passes == [NUM_PROMPT, *[1] * (NUM_STEPS - 1)]
    assert torch.equal(got.sequences, expected.sequences)
    assert distance(got, expected) < ROUNDING


def generated(model: Model) -> Any:
    return model.hf.generate(
        **prompt("text"),
        max_new_tokens=NUM_STEPS,
        do_sample=False,
        eos_token_id=None,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )


def distance(got: Any, expected: Any) -> float:
    ours, theirs = torch.stack(got.logits), torch.stack(expected.logits)
    assert theirs.norm() > 0.1
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_decoder_decodes_as_its_modules(tmp_path: Path, passes: list[int]) -> None:
    """Norms are replaced; no plan has the attention to what the encoder gives."""
    write_checkpoint(tmp_path / "checkpoint", "switch_transformers", d_model=64)
    store = quantize(tmp_path / "checkpoint", tmp_path / "store", codec="int8", dense_codec="int8")
    with open_model(store) as fast, open_model(store, fast_path=False) as plain:
        assert fast.fast_path is not None
        assert {layer.kind for layer in fast.fast_path.layers} == {"modules"}
        norms = [vars(module).get("forward") for module in fast.hf.modules()]
        assert any(isinstance(norm, FusedRMSNorm) for norm in norms)
        got, expected = generated(fast), generated(plain)
    assert not passes
    assert len(got.sequences[0].unique()) > 2
    assert torch.equal(got.sequences, expected.sequences)
    assert distance(got, expected) < ROUNDING
