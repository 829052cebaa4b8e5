"""Guesses of a checkpoint's own layer for multi-token prediction: what it computes, its cache, and the same tokens."""

import copy
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.cache_utils import LinearAttentionLayer, MtpCache
from transformers.modeling_layers import MtpModel

from offload_moe import load
from offload_moe.chat import ahead, sharing
from offload_moe.chat.steering import Steering
from offload_moe.chat.stream import TokenStream
from offload_moe.convert.quantize import quantize
from offload_moe.decode import make_room
from offload_moe.engine.assemble import skeleton_of
from offload_moe.engine.build import Blueprint, build, pools_of
from offload_moe.engine.model import Model
from offload_moe.engine.mtp import mtp_skeleton
from offload_moe.families.cache_name import with_cache
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.residency.counters import Counters
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.governor import EveryGuess
from offload_moe.speculate.guess import MOST_GUESSES, NO_GUESS, Guess
from offload_moe.speculate.mtp import FinalStates, MtpModule, MtpSource
from offload_moe.speculate.row_governor import RowGovernor
from offload_moe.speculate.speculation import Speculation
from offload_moe.speculate.speculator import Speculator
from offload_moe.store import Store
from tests.support.mtp import FAMILIES, FIRST, write_mtp_checkpoint
from tests.support.passes import contents
from tests.support.quantized import edit_tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
PATTERNS = [(number, num_right) for number in range(1, MOST_GUESSES + 1) for num_right in range(number + 1)]
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0}
PROMPT = torch.tensor([[7, 9, 11, 5, 5, 60, 3, 42, 17, 200, 31, 8, 77, 63, 5, 9, 140, 2, 19, 23, 51]])
ATTENDING = ("deepseek_v3", "glm4_moe")  # prompts of which have the bits of decode steps
IN_DEFAULT_RUN = (*ATTENDING, "qwen3_next")
Contents = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mtp")
    return {family: write_mtp_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def stores(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {name: quantize(folder, folder / "store", codec="nf4") for name, folder in checkpoints.items()}


@pytest.fixture(scope="module", params=IN_DEFAULT_RUN)
def model(request: pytest.FixtureRequest, stores: dict[str, Path]) -> Iterator[Model]:
    with load(stores[request.param], speculate="mtp", context=512) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def states(model: Model) -> FinalStates:
    return FinalStates(model.hf.get_decoder())


def module_of(model: Model) -> MtpModule:
    return MtpModule(model.engine.mtp, model.hf.config.vocab_size)


def first_entries(cache: DynamicCache, number: int) -> Contents:
    """So many of them."""
    return [(keys[:, :, :number], values[:, :, :number]) for keys, values in contents(cache)]


def assert_same(left: Contents, right: Contents) -> None:
    for (keys, values), (other_keys, other_values) in zip(left, right, strict=True):
        assert keys.abs().max() > 1e-3
        assert torch.equal(keys, other_keys)
        assert torch.equal(values, other_values)


def stream_of(
    model: Model, source: Any = None, *, cache: Any = None, prompt: Tensor | None = None, **settings: Any
) -> TokenStream:
    steering, seed = settings.pop("steering", Steering()), settings.pop("seed", 5)
    defaults = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1000}
    speculator = None if source is None else Speculator(source, PassCosts(), Counters(), EveryGuess())
    return TokenStream(
        model.hf,
        PROMPT if prompt is None else prompt,
        GenerationConfig(disable_compile=True, **(defaults | settings)),
        cache=DynamicCache(config=model.hf.config) if cache is None else cache,
        seed=seed,
        steering=steering,
        speculator=speculator,
    )


class Mixed(MtpSource):
    """Makes the layer's guesses, and gives the tokens of a known answer, so many and so many of them right."""

    def __init__(self, module: MtpModule, states: FinalStates, answer: Sequence[int]) -> None:
        super().__init__(module, states)
        self._answer = answer
        self.made: Counter[tuple[int, int]] = Counter()
        self.lengths: list[int] = []

    def guess(self, most: int) -> Guess:
        number, num_right = PATTERNS[self.made.total() % len(PATTERNS)]
        own = super().guess(min(most, number))
        assert len(own.tokens) == min(most, number)
        self.lengths.append(self.followed.cache.get_seq_length())
        known = self._answer[len(self.followed.ids) - len(PROMPT[0]) :][: len(own.tokens)]
        self.made[number, num_right] += 1
        return Guess(tuple(token if at < num_right else (token + 1) % 64 for at, token in enumerate(known)))


def is_linear(model: Model) -> bool:
    return any(isinstance(layer, LinearAttentionLayer) for layer in DynamicCache(config=model.hf.config).layers)


@torch.inference_mode()
def entries(model: Model, ids: Sequence[int]) -> tuple[Tensor, DynamicCache]:
    """The layer's last state ``[1, H]`` for a sequence, and its cache, both computed at once.

    The model's own states, too, unless it has linear attention, whose prompts round otherwise than its decode steps.
    """
    module = module_of(model)
    cache, inner = module.new_cache(), DynamicCache(config=model.hf.config)
    first = PROMPT.shape[1] if is_linear(model) else len(ids)
    pieces = [torch.tensor([ids[:first]]), *torch.tensor([ids[first:]]).split(1, dim=1)]
    decoder = model.hf.get_decoder()
    found = [decoder(input_ids=each, **with_cache(inner)).last_hidden_state for each in pieces if each.numel()]
    states = torch.cat(found, dim=1)[0]
    return module(ids[1:], states[:-1], cache)[-1:], cache


def _as_theirs(name: str) -> str:
    """What `MtpModel` has no mapping for."""
    return name.replace("final_layernorm", "shared_head.norm")


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_it_computes_what_transformers_has_published(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In fp32 and without loss; names, projection, layer, norm, head, and one guess behind the other."""
    folder = Path(shutil.copytree(checkpoints[family], tmp_path / "theirs", ignore=shutil.ignore_patterns("store")))
    edit_tensors(folder, lambda tensors: {_as_theirs(name): tensor for name, tensor in tensors.items()})
    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    main._keys_to_ignore_on_load_unexpected = [rf"{FIRST}.*", r"^mtp\..*"]
    main.config.num_mtp_layers, main.config.mtp_mlp_layer_types = 1, ["sparse"]
    main.config.mtp_layer_types = ["full_attention"]
    theirs = MtpModel.from_pretrained(main).eval()
    cache = MtpCache(config=main.config.get_mtp_config())
    states = main.model(PROMPT).last_hidden_state
    settings = {"position_ids": torch.arange(1, PROMPT.shape[1])[None], "mtp_cache": cache}
    expected = [theirs.forward_layer(0, states[:, :-1], input_ids=PROMPT[:, 1:], **settings)[0]]
    tokens = []
    for at in range(3):
        tokens.append(int(main.lm_head(expected[-1][-1:])[0].argmax()))
        settings["position_ids"] = torch.tensor([[PROMPT.shape[1] + at]])
        last = expected[-1][None, -1:]
        expected.append(theirs.forward_layer(0, last, input_ids=torch.tensor([tokens[-1:]]), **settings)[0])

    store = Store.open(quantize(checkpoints[family], tmp_path / "store", codec="bf16"))
    pools = pools_of(store, slot_bytes=store.layers[0].record_bytes, num_ram_slots=12, has_mtp=True)
    blueprint = Blueprint(pools=pools, device=torch.device("cpu"), dtype=torch.float32, is_exact=True)
    engine = build(store, blueprint, skeleton_of(store, torch.float32), mtp_skeleton(store, torch.float32))
    module = MtpModule(engine.mtp, 264)
    ours = module.new_cache()
    got = [module(PROMPT[0, 1:].tolist(), states[0, :-1], ours)]
    for token in tokens:
        assert module.likeliest(got[-1][-1:]) == token
        got.append(module([token], got[-1][-1:], ours))
    for mine, wanted in zip(got, expected, strict=True):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(mine, wanted, rtol=2e-4, atol=2e-4)
    make_room(engine.mtp, None, None)
    source = MtpSource(module, FinalStates(engine.hf.get_decoder()))
    *prompt, last_token = PROMPT[0].tolist()
    source.begin(prompt)
    with source.passing(0, prompt):
        engine.hf.model(torch.tensor([prompt]))
    assert source.guess(3) == NO_GUESS  # the model has not chosen a token yet
    source.take(last_token)
    assert source.guess(3) == Guess(tuple(tokens))
    engine.hierarchy.close()


@pytest.mark.parametrize(
    "model",
    [pytest.param(family, marks=[pytest.mark.slow] * (family not in IN_DEFAULT_RUN)) for family in FAMILIES],
    indirect=True,
)
@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, SAMPLED], ids=["greedy", "sampled"])
def test_every_pattern_of_rejections(
    model: Model, states: FinalStates, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = DynamicCache(config=model.hf.config), {}
    stream = stream_of(model, cache=plain, max_new_tokens=180, **settings)
    for _ in stream:
        seen[plain.get_seq_length()] = contents(plain)
    tokens, num_rolled, roll_back = stream.tokens, Counter[int](), ahead.roll_back

    def checked(cache: DynamicCache, num_tokens: int) -> None:
        roll_back(cache, num_tokens)
        num_rolled[num_tokens] += 1
        assert_same(contents(cache), seen[cache.get_seq_length()])

    monkeypatch.setattr(ahead, "roll_back", checked)
    source = Mixed(module_of(model), states, tokens)
    assert list(stream_of(model, source, max_new_tokens=180, **settings)) == tokens
    assert set(source.made) == set(PATTERNS)
    assert set(num_rolled) == set(range(1, MOST_GUESSES + 1))
    assert len(set(tokens)) > 4
    _, expected = entries(model, [*PROMPT[0].tolist(), *tokens])
    length = source.followed.cache.get_seq_length()
    assert source.lengths == sorted(source.lengths)
    assert length == source.lengths[-1] > 180
    assert_same(contents(source.followed.cache), first_entries(expected, length))


def test_guesses_are_the_layers_own_whatever_came_of_earlier_ones(model: Model, states: FinalStates) -> None:
    made: list[tuple[list[int], tuple[int, ...]]] = []

    class Noting(MtpSource):
        def guess(self, most: int) -> Guess:
            found = super().guess(most)
            made.append((list(self.followed.ids), found.tokens))
            return found

    module = module_of(model)
    list(stream_of(model, Noting(module, states), **SAMPLED))
    assert len(made) > 20
    for ids, tokens in made[::5]:
        (state, cache), alone = entries(model, ids), list[int]()
        with torch.inference_mode():
            for _ in tokens:
                alone.append(module.likeliest(state))
                state = module(alone[-1:], state, cache)
        assert tuple(alone) == tokens


@pytest.mark.parametrize("model", ATTENDING, indirect=True)
def test_what_it_knows_stays_with_the_models_cache(model: Model, states: FinalStates) -> None:
    """As in a server: each request has a source of its own, and some go on from a copy."""
    module, cache = module_of(model), DynamicCache(config=model.hf.config)
    ids = [*PROMPT[0].tolist(), *stream_of(model, MtpSource(module, states), cache=cache)]
    twin = copy.deepcopy(cache)
    for each, words in ((cache, [5, 6, 7]), (twin, [9]), (cache, [9, 30])):
        source, prompt = MtpSource(module, states), [*ids, *words]
        tokens = list(stream_of(model, source, cache=each, prompt=torch.tensor([prompt]), max_new_tokens=9))
        length = source.followed.cache.get_seq_length()
        assert length > len(prompt)
        _, expected = entries(model, [*prompt, *tokens])
        assert_same(contents(source.followed.cache), first_entries(expected, length))
        for layer in each.layers:
            layer.crop(len(ids) - 1 - layer.get_seq_length())


@pytest.mark.parametrize("run", [[5, 6], [9] * 6, [9] * 9, [9, 30] * 12])
def test_runs_that_a_grammar_forces(model: Model, states: FinalStates, run: list[int]) -> None:
    def steering() -> Steering:
        calls = count(1)
        return Steering(forced=lambda: run if next(calls) in (4, 9) else ())

    tokens = list(stream_of(model, steering=steering(), max_new_tokens=60))
    assert tokens[4 : 4 + len(run)] == run
    source = MtpSource(module_of(model), states)
    assert list(stream_of(model, source, steering=steering(), max_new_tokens=60)) == tokens
    assert source.followed.cache.get_seq_length() == len(source.followed.entries)
    assert source.followed.entries == list(range(len(source.followed.entries)))
    if not is_linear(model):  # it computes long runs as prompts, which round otherwise
        _, expected = entries(model, [*PROMPT[0].tolist(), *tokens])
        assert_same(contents(source.followed.cache), first_entries(expected, len(source.followed.entries)))


def test_guesses_that_are_made_rarely_leave_gaps(
    model: Model, states: FinalStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, made = count(), list[Guess]()

    class Noting(MtpSource):
        def guess(self, most: int) -> Guess:
            made.append(super().guess(most))
            return made[-1]

    monkeypatch.setattr(
        EveryGuess, "choose", lambda self, kind, most, num_behind=0: 0 if next(passes) % 20 else min(most, 2)
    )
    source, cache = Noting(module_of(model), states), DynamicCache(config=model.hf.config)
    tokens = list(stream_of(model, source, cache=cache, max_new_tokens=70))
    assert [len(guess.tokens) for guess in made] == [2] * 4
    followed = source.followed
    num_left_out = followed.entries[-1] + 1 - len(followed.entries)
    assert 3 * (20 - MAX_ROWS) >= num_left_out > 20
    assert followed.cache.get_seq_length() == len(followed.entries)
    source.begin([*PROMPT[0].tolist(), *tokens[:30], 5])
    assert followed.entries[-1] <= PROMPT.shape[1] + 28
    assert followed.cache.get_seq_length() == len(followed.entries) > PROMPT.shape[1]


def test_passes_that_are_shared_with_another_answer_leave_gaps(
    model: Model, states: FinalStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = [SAMPLED | {"prompt": PROMPT, "seed": 5}, SAMPLED | {"prompt": PROMPT[:, 4:], "seed": 6}]
    expected = [list(stream_of(model, **each)) for each in choices]
    passes, shared, guesses, compute = count(), count(), list[Guess](), sharing.next_logits

    class Noting(MtpSource):
        def guess(self, most: int) -> Guess:
            guesses.append(super().guess(most))
            return guesses[-1]

    def counted(*arguments: Any) -> Tensor:
        next(shared)
        return compute(*arguments)

    monkeypatch.setattr(Speculation, "may_share", True)  # `states` has hooks that were not there after the load
    monkeypatch.setattr(sharing, "next_logits", counted)
    monkeypatch.setattr(RowGovernor, "choose", lambda self, most: most if next(passes) % 12 > 5 else 1)
    monkeypatch.setattr(RowGovernor, "rate", lambda self, num_rows: 100.0)
    streams = [stream_of(model, Noting(module_of(model), states), **each) for each in choices]
    while [next(stream, None) for stream in streams] != [None, None]:
        pass
    assert [stream.tokens for stream in streams] == expected
    assert expected[0] != expected[1]
    assert next(shared) > 10
    assert sum(bool(guess.tokens) for guess in guesses) > 2
