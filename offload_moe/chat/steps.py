"""One request, step by step: the tokens that transformers' `generate()` gives for one sequence.

generate() itself prepares the request: processors, stopping criteria, cache, encoder. The loop stands here, so that
requests of one model may alternate, no thread is needed, and a usual step passes one token and its position.

S tokens so far, N new ones, V vocabulary.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerationMixin

from offload_moe.chat.ahead import Compute, GuessedRows
from offload_moe.chat.choice import Choice, Found
from offload_moe.chat.prefix import continues_exactly
from offload_moe.chat.prompt_chunks import prompt_chunk_tokens
from offload_moe.chat.recompute import recompute_of
from offload_moe.chat.sequence import TokenIds
from offload_moe.chat.sharing import Member
from offload_moe.chat.steering import NO_STEERING, Steering
from offload_moe.chat.stopping import Stops
from offload_moe.decode.next_token import Draw, TokenPass, Wanted, head_alone_of, token_pass_of
from offload_moe.errors import ConfigError
from offload_moe.families.cache_name import CACHE, cache_from, cache_in, with_cache
from offload_moe.families.text_model import TextModel
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.speculator import Speculator

Watched = Callable[[int], AbstractContextManager[None]]  # the context that so many tokens are computed in
Passing = Callable[[int, Sequence[int]], AbstractContextManager[None]]  # around a pass: the first token's place, ids
SHORT_INPUTS = {CACHE, "position_ids", "attention_mask", "logits_to_keep", "use_cache"}
OWN_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


@dataclass(slots=True)
class _Request:
    """A request as generate() prepares it."""

    sequence: TokenIds  # of the decoder
    processors: LogitsProcessorList
    stops: Stops
    config: GenerationConfig
    inputs: dict[str, Any]  # of the next forward, beside the token ids

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        length: int = self.config.max_length
        return length - len(self.sequence)


def steps(
    hf: TextModel,
    input_ids: Tensor,
    config: GenerationConfig,
    *,
    cache: Cache | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | None = None,
    watched: Watched = lambda num_tokens: nullcontext(),
    steering: Steering = NO_STEERING,
    speculator: Speculator | None = None,
    member: Member | None = None,
) -> Generator[int | None, None, None]:
    """Each `next` computes one step: a part of the prompt (None), or the next token. Call it in inference mode.

    Tokens that the steering forces cost no `next` of the model: the run is computed together with the token before it.

    input_ids: ``[1, S]``, the whole sequence, also where the cache holds its beginning.
    seed: None draws from torch's own random numbers.
    speculator: guesses tokens, which changes none of them; used where the model's own methods pass a token and its
    position alone. Once it has ended, the cache holds the sequence without its last token.
    member: a new one lets passes have rows of other answers too, which changes no token either.

    Raises: ConfigError when the cache leaves no token to compute, or stop strings come without a tokenizer.
    """
    with watched(input_ids.shape[1]):  # `_prepare` runs an encoder
        request = _prepare(hf, input_ids, config, cache, tokenizer, steering)
    sequence = request.sequence
    passing: Passing = _around_nothing
    if speculator is not None:
        speculator.begin(list(sequence.ids), cache_in(request.inputs))
        passing = speculator.passing
    found: Found | None = None
    for found in _compute_prompt(hf, request, watched, passing):
        if found is None:
            yield None
    is_short = _is_short(hf, request)
    token_pass = token_pass_of(hf) if is_short else None
    choice = Choice(
        request.processors,
        steering,
        token_pass,
        is_sampled=bool(request.config.do_sample),
        seed=seed,
        device=sequence.device,
    )
    compute = (
        _decode_short(hf, request, token_pass, choice.draw, passing)
        if is_short
        else partial(_decode, hf, request, watched)
    )
    rows = GuessedRows(
        hf,
        cache_in(request.inputs),
        compute,
        speculator=speculator if is_short else None,
        member=member if is_short and _counts_positions(request) else None,
    )
    takes_runs = bool(request.inputs["use_cache"]) and continues_exactly(hf)
    try:
        while True:
            assert found is not None
            token = choice.choose(sequence.tensor, len(sequence), found)
            sequence.append(token)
            rows.follow(token)
            is_over = request.stops.are_met(sequence)
            if not is_over:
                rows.offer(request.num_left - 1)
            yield token
            if is_over:
                return
            forced = steering.forced() if takes_runs else ()
            if len(forced) >= MAX_ROWS:
                rows.take_back()  # so many are computed as a prompt is, which rounds otherwise than decode steps
            for token in forced:
                sequence.append(token)
                rows.follow(token)
                yield token
                if request.stops.are_met(sequence):
                    return
            found = rows.next(request.num_left - 1)
    finally:
        rows.take_back()


def _prepare(
    hf: TextModel,
    input_ids: Tensor,
    config: GenerationConfig,
    cache: Cache | None,
    tokenizer: PreTrainedTokenizerBase | None,
    steering: Steering,
) -> _Request:
    """The request that generate() prepares: it passes it to its custom decoding method, here `take`."""

    def take(
        model: TextModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> _Request:
        sequence = TokenIds(input_ids)
        return _Request(sequence, logits_processor, Stops(stopping_criteria), generation_config, model_kwargs)

    arguments: dict[str, Any] = {} if cache is None else with_cache(cache)
    if steering.processors:
        arguments["logits_processor"] = LogitsProcessorList(steering.processors)
    if config.stop_strings is not None:  # generate() uses no tokenizer with a custom method
        if tokenizer is None:
            raise ConfigError("This model's answers end at strings of text, which needs a tokenizer. Give it one.")
        arguments["stopping_criteria"] = [StopStringCriteria(tokenizer, config.stop_strings)]
        config = copy.deepcopy(config)
        config.__class__ = _WithoutStopStrings
    request: _Request = hf.generate(input_ids, generation_config=config, custom_generate=take, **arguments)
    return request


class _WithoutStopStrings(GenerationConfig):
    """Has no stop strings, also where the model's own config has: generate() fills a plain None from it."""

    stop_strings = property(lambda self: None, lambda self, value: None)


def _around_nothing(first: int, ids: Sequence[int]) -> AbstractContextManager[None]:
    return nullcontext()


def _compute_prompt(hf: TextModel, request: _Request, watched: Watched, passing: Passing) -> Iterator[Tensor | None]:
    """None after each part but the last, then the logits ``[1, V]``."""
    recompute = recompute_of(hf)
    ids = request.sequence.tensor()
    length = ids.shape[1] if recompute is None else recompute.begin(ids, request.inputs)
    cache = cache_in(request.inputs)
    first = 0 if cache is None or hf.config.is_encoder_decoder else cache.get_seq_length()
    end = ids.shape[1]
    if first >= end:
        raise ConfigError(
            f"The cache holds {first:,} tokens and the sequence has {end:,}, so there is none to compute."
        )
    chunk = prompt_chunk_tokens(hf) or end
    for begin in range(first, end, chunk):
        last = min(begin + chunk, end)
        with (
            watched(last - begin),
            nullcontext() if recompute is None else recompute.whole_sequence_of(length),
            passing(begin, ids[0, begin:last].tolist()),
        ):
            outputs = hf(**_inputs_of_part(hf, request, begin, last), return_dict=True)
        if last < end:
            request.inputs[CACHE] = cache_from(outputs)
            del outputs
            yield None
    yield _take(hf, request, outputs)


def _inputs_of_part(hf: TextModel, request: _Request, begin: int, end: int) -> dict[str, Any]:
    inputs = dict(request.inputs)
    if inputs.get("attention_mask") is not None and not hf.config.is_encoder_decoder:
        inputs["attention_mask"] = inputs["attention_mask"][:, :end]
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"][..., begin:end]
    prepared: dict[str, Any] = hf.prepare_inputs_for_generation(
        request.sequence.tensor()[:, begin:end], is_first_iteration=True, **inputs
    )
    return prepared


def _decode(hf: TextModel, request: _Request, watched: Watched, num_new: int, guesses: Sequence[int]) -> list[Found]:
    """The logits after the last tokens, by the model's own methods, which take no guesses."""
    assert not guesses
    if num_new > 1:
        request.inputs = hf._update_model_kwargs_for_generation(
            {}, request.inputs, is_encoder_decoder=hf.config.is_encoder_decoder, num_new_tokens=num_new - 1
        )
    length = num_new if request.inputs["use_cache"] else None
    with watched(0):
        inputs = hf.prepare_inputs_for_generation(
            request.sequence.tensor(), next_sequence_length=length, **request.inputs
        )
        outputs = hf(**inputs, return_dict=True)
    return [_take(hf, request, outputs)]


def _take(hf: TextModel, request: _Request, outputs: Any) -> Tensor:
    request.inputs = hf._update_model_kwargs_for_generation(
        outputs, request.inputs, is_encoder_decoder=hf.config.is_encoder_decoder
    )
    return _last_logits(request, outputs.logits)


def _last_logits(request: _Request, logits: Tensor, num_rows: int = 1) -> Tensor:
    """Of ``[1, T, V]`` the last ``[num_rows, V]``; a copy, where there are more: those of a prompt may be large."""
    is_part = logits.shape[1] > num_rows
    return logits[0, -num_rows:].to(copy=is_part, dtype=torch.float32, device=request.sequence.device)


def _is_short(hf: TextModel, request: _Request) -> bool:
    """Whether the model's own methods pass the token, its position and the cache, and nothing else."""
    is_usual = all(getattr(getattr(hf, name), "__func__", None) is vars(GenerationMixin)[name] for name in OWN_METHODS)
    cache = cache_in(request.inputs)
    return (
        is_usual
        and not hf.config.is_encoder_decoder
        and not hf.is_remote_code()
        and request.inputs.keys() <= SHORT_INPUTS
        and request.inputs.get("attention_mask") is None
        and isinstance(cache, Cache)
        and not cache.is_compileable
        and request.inputs["use_cache"]
    )


def _decode_short(
    hf: TextModel, request: _Request, token_pass: TokenPass | None, draw: Draw | None, passing: Passing
) -> Compute:
    """The logits of `_decode`, without a call of those methods, and behind each guess, too; or the tokens by a draw."""
    inputs, sequence, offset, alone = dict(request.inputs), request.sequence, _offset(request), head_alone_of(hf)
    keeps_some = "logits_to_keep" in inputs
    inputs.pop("logits_to_keep", None)  # an argument of the model, not of its decoder

    def compute(num_new: int, guesses: Sequence[int]) -> list[Found]:
        num_rows, first = 1 + len(guesses), len(sequence) - num_new
        inputs["input_ids"] = sequence.last(num_new, guesses)
        if offset is not None:
            inputs["position_ids"] = offset + torch.arange(first, first + num_new + len(guesses), device=offset.device)
        if token_pass is not None and token_pass.is_clear:
            return _pass(hf, request, inputs, Wanted(draw=draw), num_rows)
        with passing(first, [*sequence.ids[first:], *guesses]):
            if alone is not None and alone.is_clear:
                logits = _behind(hf, hf.get_decoder()(**inputs), num_rows)
            else:
                kept = {"logits_to_keep": num_rows} if keeps_some else {}
                logits = hf(**inputs, **kept, return_dict=True).logits
        return list(_last_logits(request, logits, num_rows).split(1))

    return compute


def _behind(hf: TextModel, output: Any, num_rows: int) -> Tensor:
    """The logits ``[1, num_rows, V]`` that the output head gives behind an output of the decoder."""
    head = hf.get_output_embeddings()
    assert head is not None
    logits: Tensor = head(output.last_hidden_state[:, -num_rows:])
    return logits


def _offset(request: _Request) -> Tensor | None:
    """From the number of a token in the sequence to its position. None where positions are not given."""
    positions: Tensor | None = request.inputs.get("position_ids")  # up to the first token that is not computed
    return None if positions is None else positions[..., -1:] - len(request.sequence)


def _counts_positions(request: _Request) -> bool:
    """Whether the position of each token is its number."""
    offset = _offset(request)
    return offset is None or not offset.any()


def _pass(hf: TextModel, request: _Request, inputs: dict[str, Any], wanted: Wanted, num_rows: int) -> list[Found]:
    """What is behind the last rows, by the decoder alone; where its modules took them, by the output head."""
    output = hf.get_decoder()(**inputs, wanted=wanted)
    if wanted.tokens:
        return list(wanted.tokens[-num_rows:])
    logits = _behind(hf, output, num_rows) if wanted.logits is None else wanted.logits[None, -num_rows:].clone()
    return list(_last_logits(request, logits, num_rows).split(1))
