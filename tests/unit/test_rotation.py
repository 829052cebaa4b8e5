"""Keys that are rotated by the length of the sequence, against one fresh forward over all its tokens."""

import copy
import logging
import threading
from typing import Any

import pytest
import torch
from support.chat import byte_tokenizer, chat_model
from torch import Tensor
from transformers import AutoConfig, DynamicCache, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from offload_moe.chat import ChatSession, prompt_chunks
from offload_moe.chat.answer import Answer
from offload_moe.chat.recompute import recompute_of
from offload_moe.checkpoint.skeleton import build_skeleton
from offload_moe.decode import make_fast
from offload_moe.decode.rotation import Rotation, rotation_keeper
from offload_moe.errors import ConfigError, UnsupportedModelError
from offload_moe.families.cache_name import cache_from, with_cache

WINDOW, CHUNK = 48, 16
TOLERANCE = 2e-4


def longrope(num_angles: int = 8) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": WINDOW,
        "short_factor": [1.0] * num_angles,
        "long_factor": [4.0] * num_angles,
    }


MSCALES = {"short_mscale": 1.2, "long_mscale": 1.3}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
# Whatever the kind, Phi-3.5-MoE has another scale beyond the window.
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BY_TYPE = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": longrope() | MSCALES}),
    "scaled": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN | MSCALES}),
    "longrope": ("qwen3_moe", {**EXPERTS, "rope_parameters": longrope()}),
    "sliding": ("gpt_oss", {"rope_parameters": longrope()}),
    "recurrent": ("qwen3_next", {"rope_parameters": longrope(2)}),
    "by layer type": (
        "gemma3_text",
        {**BY_TYPE, "rope_parameters": {"full_attention": longrope(), "sliding_attention": PLAIN}},
    ),
    "dynamic": ("qwen3_moe", {**EXPERTS, "rope_parameters": DYNAMIC, "max_position_embeddings": WINDOW}),
    "dynamic by layer type": (
        "gemma3_text",
        {
            **BY_TYPE,
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN},
            "max_position_embeddings": WINDOW,
        },
    ),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_chunks, "CPU_PROMPT_TOKENS", CHUNK)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def fresh(name: str) -> PreTrainedModel:
    """transformers' model, which has seen nothing yet: dynamic embeddings remember the longest sequence."""
    family, settings = SETTINGS[name]
    return chat_model(family, **settings)


def ours(name: str) -> PreTrainedModel:
    hf = fresh(name)
    assert recompute_of(hf) is not None
    return hf


def prompt_of(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def expected_logits(name: str, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return fresh(name)(ids, attention_mask=mask, position_ids=positions).logits[:, -1]


def generate(hf: PreTrainedModel, ids: Tensor, num_new: int, **settings: Any) -> Any:
    return hf.generate(
        ids,
        max_new_tokens=num_new,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
        **{"do_sample": False, **settings},
    )


def check_every_step(name: str, out: Any, num_prompt: int, mask: Tensor | None = None) -> None:
    for step, got in enumerate(out.logits):
        ids = out.sequences[:, : num_prompt + step]
        whole = None if mask is None else torch.cat((mask, mask.new_ones(len(mask), step)), 1)
        expected = expected_logits(name, ids, whole)
        assert expected.abs().max() > 0.1
        assert torch.allclose(got, expected, atol=TOLERANCE), (name, ids.shape[1], (got - expected).abs().max())


@pytest.mark.parametrize("name", list(SETTINGS))
def test_an_answer_across_the_window_is_that_of_fresh_forwards(name: str) -> None:
    hf = ours(name)
    check_every_step(name, generate(hf, prompt_of(WINDOW - 2), 6), WINDOW - 2)
    # The rotary embedding has now seen a longer sequence than this one, and a shorter one follows.
    check_every_step(name, generate(hf, prompt_of(WINDOW + 1), 2), WINDOW + 1)
    check_every_step(name, generate(hf, prompt_of(WINDOW // 2), 2), WINDOW // 2)


@pytest.mark.parametrize("name", ["phimoe", "scaled", "longrope", "by layer type", "dynamic"])
def test_a_prompt_in_chunks_is_rotated_as_a_whole(name: str) -> None:
    length = 2 * WINDOW + 5
    check_every_step(name, generate(ours(name), prompt_of(length), 2, prefill_chunk_size=CHUNK), length)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_the_longest_sequence_of_a_batch_decides(name: str) -> None:
    ids = prompt_of(WINDOW + 2, batch=2)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0  # the longest has 46 tokens
    mask[1, :9] = 0
    out = generate(ours(name), ids, 5, attention_mask=mask)
    check_every_step(name, out, ids.shape[1], mask)


def test_beams_cross_together() -> None:
    ids = prompt_of(WINDOW - 3)
    settings = {"num_beams": 3, "do_sample": False}
    got = ours("longrope").generate(ids, max_new_tokens=8, eos_token_id=None, **settings)
    without_cache = fresh("longrope").generate(ids, max_new_tokens=8, eos_token_id=None, use_cache=False, **settings)
    assert torch.equal(got, without_cache)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_a_cache_of_the_caller_is_brought_up_to_date(name: str) -> None:
    hf, ids = ours(name), prompt_of(WINDOW + 6)
    cache = DynamicCache(config=hf.config)
    generate(hf, ids[:, : WINDOW - 4], 1, **with_cache(cache))
    check_every_step(name, generate(hf, ids, 2, **with_cache(copy.deepcopy(cache))), ids.shape[1])
    check_every_step(name, generate(hf, ids, 2, **with_cache(cache)), ids.shape[1])
    cache.crop(-(cache.get_seq_length() - 20))  # of keys for a long sequence
    check_every_step(name, generate(hf, ids[:, :30], 2, **with_cache(cache)), 30)


def test_a_sequence_that_is_not_given_whole_is_refused() -> None:
    hf, ids = ours("longrope"), prompt_of(WINDOW - 1)
    with pytest.raises(ConfigError, match=f"comes to {WINDOW + 1} tokens"):
        generate(hf, None, 4, inputs_embeds=hf.get_input_embeddings()(ids))


def test_a_forward_that_continues_across_the_window_says_so(caplog: pytest.LogCaptureFixture) -> None:
    hf, ids = ours("longrope"), prompt_of(WINDOW + 4)
    with torch.inference_mode():
        cache = cache_from(hf(ids[:, :-8], use_cache=True))
        assert not caplog.records
        hf(ids[:, -8:], **with_cache(cache))
    assert f"beyond {WINDOW} tokens" in caplog.text


def test_dynamic_rotation_says_what_it_costs(caplog: pytest.LogCaptureFixture) -> None:
    generate(ours("dynamic"), prompt_of(WINDOW), 5)
    assert len([record for record in caplog.records if "dynamic NTK" in record.message]) == 1


@pytest.mark.parametrize("name", ["phimoe", "longrope", "by layer type"])
@pytest.mark.parametrize("long_factor", [[4.0] * 5, [4.0] * 9, ["far"] * 8, []])
def test_long_factors_that_do_not_fit_are_refused_at_once(name: str, long_factor: list[object]) -> None:
    family, settings = SETTINGS[name]
    parameters = copy.deepcopy(settings["rope_parameters"])
    parameters.get("full_attention", parameters)["long_factor"] = long_factor
    config = AutoConfig.for_model(family, **(settings | {"rope_parameters": parameters}), **SMALL)
    with pytest.raises(UnsupportedModelError, match=r"LongRoPE factors \(long_factor\) .* Take the config\.json"):
        build_skeleton(config)


@pytest.mark.parametrize("name", ["phimoe", "longrope", "by layer type"])
def test_a_skeleton_begins_with_the_short_factors(name: str) -> None:
    family, settings = SETTINGS[name]
    model = build_skeleton(AutoConfig.for_model(family, **settings, **SMALL))
    frequencies = [
        value for name, value in model.named_buffers() if name.endswith("inv_freq") and "original" not in name
    ]
    assert frequencies
    assert all(value.max() == 1.0 for value in frequencies)


def test_other_models_are_left_alone() -> None:
    hf = chat_model("qwen3_moe", **EXPERTS)
    before = dict(vars(hf))
    assert recompute_of(hf) is None
    assert rotation_keeper(hf) is None
    assert "_prefill" not in vars(hf)
    assert vars(hf).keys() - before.keys() == {"_offload_moe_rotation"}
    assert not hf.get_decoder()._forward_pre_hooks


def test_hunyuan_calls_a_fixed_rotation_dynamic() -> None:
    rope = DYNAMIC | {"alpha": 1000.0}
    hf = chat_model("hunyuan_v1_moe", num_experts=4, moe_topk=2, moe_intermediate_size=16, rope_parameters=rope)
    assert recompute_of(hf) is None


def test_every_kind_of_rotary_embedding_is_known() -> None:
    """Of these only longrope and dynamic look at the length; a new kind in transformers has to be looked at."""
    assert set(ROPE_INIT_FUNCTIONS) == {"linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}


def test_lengths_agree_where_their_factors_do() -> None:
    rotation = Rotation(switching=(10,), growing=(20,))
    assert rotation.factors(1) == rotation.factors(10)
    assert rotation.factors(11) == rotation.factors(20)
    assert rotation.crossed(rotation.factors(3), rotation.factors(15)) == 10
    assert rotation.crossed(rotation.factors(21), rotation.factors(22)) == 20
    assert rotation.crossed(rotation.factors(11), rotation.factors(20)) is None


class Watched:
    """A conversation whose every step is compared with a fresh forward over all tokens."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.hf = name, fresh(name)
        make_fast(self.hf, is_exact=True)
        self.session = ChatSession(self.hf, byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"))
        self.answer: Any = None
        self._logits: list[Tensor] = []
        self.hf.register_forward_hook(lambda *args: self._logits.append(args[-1].logits[0, -1].clone()))
        steps = Answer.steps
        monkeypatch.setattr(Answer, "steps", lambda answer: (setattr(self, "answer", answer), steps(answer))[1])

    def send(self, text: str | None, num_new: int, num_read: int | None = None, **settings: Any) -> Any:
        """Tokens in the context after one more turn, or another try of the last; stops behind `num_read` pieces."""
        self._logits.clear()
        settings = {"temperature": 0, "max_new_tokens": num_new, **settings}
        pieces = self.session.retry(**settings) if text is None else self.session.send(text, **settings)
        for count, _ in enumerate(pieces, 1):
            if count == num_read:
                pieces.close()
                break
        self._check()
        return self.session.last_stats

    def _check(self) -> None:
        stats, ids = self.session.last_stats, self.answer.ids
        steps = self._logits[-stats.num_decode_tokens :] if stats.num_decode_tokens else []
        for step in {0, len(steps) - 1} & set(range(len(steps))):
            expected = expected_logits(self.name, torch.tensor([ids[: stats.num_prompt_tokens + step]]))[0]
            assert torch.allclose(steps[step], expected, atol=TOLERANCE), (stats, step)


CHATS = ["phimoe", "longrope", "sliding", "recurrent", "by layer type"]


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_that_grows_across_the_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Watched(name, monkeypatch)
    assert chat.send("a" * 20, 3).crossed_window is None
    crossing = chat.send("b" * 30, 3)
    assert (crossing.crossed_window, crossing.num_reused_tokens, crossing.reuse) == (WINDOW, 0, "recomputed")
    beyond = chat.send("c" * 7, 3)
    assert beyond.crossed_window is None
    again = chat.send(None, 3)
    assert again.crossed_window is None
    chat.session.messages = chat.session.messages[:1]
    assert chat.send("d", 3).crossed_window == WINDOW  # and back


@pytest.mark.parametrize("name", CHATS)
def test_an_answer_that_grows_across_the_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Watched(name, monkeypatch)
    crossing = chat.send("a" * (WINDOW - 4), 10)
    assert (crossing.crossed_window, crossing.num_decode_tokens) == (WINDOW, 10)
    after = chat.send("b" * 12, 3)
    assert after.crossed_window is None
    if name in ("phimoe", "longrope"):  # layers that can be cropped hold what was computed at the crossing
        assert after.num_reused_tokens >= WINDOW - 4
    assert chat.send(None, 3).num_reused_tokens > 0


@pytest.mark.parametrize("name", ["longrope", "sliding"])
def test_a_stop_while_keys_are_computed_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, stop = Watched(name, monkeypatch), threading.Event()
    sizes: list[int] = []

    def stop_between_layers(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        is_anew = 1 in sizes  # behind the first step of the answer
        sizes.append(kwargs["position_ids"].shape[-1])
        if is_anew and sizes[-2:] == [CHUNK, CHUNK]:
            stop.set()

    layer = chat.hf.get_decoder().layers[0]
    handle = layer.register_forward_hook(stop_between_layers, with_kwargs=True)
    stats = chat.send("a" * (WINDOW - 4), 10, stop_event=stop)
    handle.remove()
    assert stop.is_set()
    assert stats.finish == "interrupted"
    assert 0 < stats.num_decode_tokens < 10
    assert chat.send("b" * 12, 3).num_reused_tokens <= CHUNK
    assert chat.send("c" * 3, 3).num_reused_tokens >= WINDOW - 4


def test_a_dynamic_context_ends_at_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Watched("dynamic", monkeypatch)
    stats = chat.send("a" * (WINDOW - 5), 20)
    assert (stats.finish, stats.num_decode_tokens, stats.crossed_window) == ("context", 5, None)
