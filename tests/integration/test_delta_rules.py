"""Models with linear attention by gated delta rules decode natively where the store is quantized."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock, patch

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from support.models import open_model
from support.tiny_models import tiny_model

from offload_moe.convert.quantize import quantize
from offload_moe.decode.delta import DeltaForward, DeltaKernel, fuse_delta_rules
from offload_moe.decode.dense import QuantLinear
from tests.integration.test_card_pass import logits

HEADS = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}


def num_fused(hf: Any) -> int:
    return sum(isinstance(vars(module).get("forward"), DeltaForward) for module in hf.modules())


def output_projections(hf: Any) -> list[Any]:
    found = [module for name, module in hf.named_modules() if name.endswith("linear_attn.out_proj")]
    assert found
    return found


@pytest.fixture(scope="module")
def next_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("next")
    tiny_model("qwen3_next", **HEADS).to(torch.bfloat16).save_pretrained(root / "checkpoint")
    return quantize(root / "checkpoint", root / "store", codec="int8", dense_codec="int8")


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_decode_steps_give_the_modules_logits(family: str, tmp_path: Path) -> None:
    tiny_model(family, **HEADS).to(torch.bfloat16).save_pretrained(tmp_path / family)
    store = quantize(tmp_path / family, tmp_path / "store", codec="int8", dense_codec="int8")
    with open_model(store) as fast, open_model(store, fast_path=False) as plain:
        assert num_fused(fast.hf) == 3
        assert num_fused(plain.hf) == 0
        assert all(isinstance(linear, QuantLinear) for linear in output_projections(fast.hf))
        got, expected = logits(fast.hf, 8), logits(plain.hf, 8)
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
        assert (got - expected).norm() <= 1e-2 * expected.norm()
        assert len(set(got.argmax(-1).flatten().tolist())) > 2


class Calling(ModelHook):  # type: ignore[misc]
    """A hook of accelerate that notes each call."""

    def __init__(self, called: list[int]) -> None:
        self.called = called

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.called.append(1)
        return args, kwargs


def hooked(module: Any, called: list[int]) -> Callable[[], None]:
    handle = module.register_forward_hook(lambda *_: called.append(1))
    return cast(Callable[[], None], handle.remove)


def replaced(module: Any, called: list[int]) -> Callable[[], None]:
    own = module.forward
    module.forward = lambda *args: (called.append(1), own(*args))[1]
    return partial(setattr, module, "forward", own)


def hooked_by_accelerate(module: Any, called: list[int]) -> Callable[[], None]:
    add_hook_to_module(module, Calling(called))
    return partial(remove_hook_from_module, module)


@pytest.mark.parametrize(
    ("name", "change"),
    [("norm", hooked), ("norm", replaced), ("norm", hooked_by_accelerate), ("conv1d", hooked_by_accelerate)],
)
def test_a_step_calls_what_hooks_are_on(name: str, change: Any, next_store: Path) -> None:
    """And is native again without them."""
    with open_model(next_store) as model:
        expected, called = logits(model.hf, 3), list[int]()
        undo = change(model.hf.model.layers[0].linear_attn.get_submodule(name), called)
        got = logits(model.hf, 3)
        assert len(called) == 3  # the prompt and two steps
        assert (got - expected).norm() <= 1e-2 * expected.norm()
        undo()
        assert torch.equal(logits(model.hf, 3), expected)
        assert len(called) == 3
        step = Mock(side_effect=AssertionError)
        with patch.object(DeltaKernel, "step", step), suppress(AssertionError):
            logits(model.hf, 3)
        assert step.called


@pytest.mark.parametrize(("name", "error"), [("DeltaKernel", AttributeError), ("Projected", TypeError)])
def test_an_error_of_our_own_is_no_refusal(name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Mock(side_effect=error("a fault of ours")) if error is AttributeError else None
    monkeypatch.setattr(f"offload_moe.decode.delta.{name}", fault)
    with pytest.raises(error):
        fuse_delta_rules(tiny_model("qwen3_next", **HEADS))


@pytest.mark.parametrize(("path", "name"), [("norm", "variance_epsilon"), ("", "head_k_dim"), ("", "in_proj_ba")])
def test_a_layer_with_other_parts_keeps_its_forward(path: str, name: str) -> None:
    hf: Any = tiny_model("qwen3_next", **HEADS)
    delattr(hf.model.layers[1].linear_attn.get_submodule(path), name)
    assert fuse_delta_rules(hf) == 2


def test_a_lossless_store_keeps_the_modules_bits(tmp_path: Path) -> None:
    tiny_model("qwen3_next", **HEADS).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    store = quantize(tmp_path / "checkpoint", tmp_path / "store", codec="bf16", dense_codec="bf16")
    with open_model(store) as model:
        assert num_fused(model.hf) == 0
