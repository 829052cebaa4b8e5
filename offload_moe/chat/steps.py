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
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerationMixin

from offload_moe.chat.ahead import Compute, GuessedRows
from offload_moe.chat.prefix import continues_exactly
from offload_moe.chat.prompt_chunks import prompt_chunk_tokens
from offload_moe.chat.recompute import recompute_of
from offload_moe.chat.sharing import Member
from offload_moe.chat.steering import NO_STEERING, Steering
from offload_moe.errors import ConfigError
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.speculator import Speculator

Watched = Callable[[int], AbstractContextManager[None]]  # the context that so many tokens are computed in
SHORT_INPUTS = {"past_key_values", "position_ids", "attention_mask", "logits_to_keep", "use_cache"}
OWN_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


@dataclass(slots=True)
class _Request:
    """A request as generate() prepares it."""

    input_ids: Tensor  # [1, S], of the decoder
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    inputs: dict[str, Any]  # of the next forward, beside the token ids

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        length: int = self.config.max_length
        return length - self.input_ids.shape[1]


def steps(
    hf: PreTrainedModel,
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
    random = None if seed is None else torch.Generator(request.input_ids.device).manual_seed(seed)
    logits = None
    for logits in _compute_prompt(hf, request, watched):
        if logits is None:
            yield None
    is_short = _is_short(hf, request)
    compute = _decode_short(hf, request) if is_short else partial(_decode, hf, request, watched)
    rows = GuessedRows(
        hf,
        request.inputs.get("past_key_values"),
        request.input_ids[0].tolist(),
        compute,
        speculator=speculator if is_short else None,
        member=member if is_short and _counts_positions(request) else None,
    )
    takes_runs = bool(request.inputs["use_cache"]) and continues_exactly(hf)
    try:
        while True:
            assert logits is not None
            steering.observe(logits)
            token = _choose(request, logits, random)
            rows.follow(token)
            is_over = _is_over(request)
            if not is_over:
                rows.offer(request.num_left - 1)
            yield token
            if is_over:
                return
            forced = steering.forced() if takes_runs else ()
            if len(forced) >= MAX_ROWS:
                rows.take_back()  # so many are computed as a prompt is, which rounds otherwise than decode steps
            for token in forced:
                _append(request, torch.tensor([[token]], device=request.input_ids.device))
                rows.follow(token)
                yield token
                if _is_over(request):
                    return
            logits = rows.next(request.num_left - 1)
    finally:
        rows.take_back()


def _prepare(
    hf: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    cache: Cache | None,
    tokenizer: PreTrainedTokenizerBase | None,
    steering: Steering,
) -> _Request:
    """The request that generate() prepares: it passes it to its custom decoding method, here `take`."""

    def take(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> _Request:
        return _Request(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    arguments: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
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


def _compute_prompt(hf: Any, request: _Request, watched: Watched) -> Iterator[Tensor | None]:
    """None after each part but the last, then the logits ``[1, V]``."""
    recompute = recompute_of(hf)
    length = request.input_ids.shape[1] if recompute is None else recompute.begin(request.input_ids, request.inputs)
    cache = request.inputs.get("past_key_values")
    first = 0 if cache is None or hf.config.is_encoder_decoder else cache.get_seq_length()
    end = request.input_ids.shape[1]
    if first >= end:
        raise ConfigError(
            f"The cache holds {first:,} tokens and the sequence has {end:,}, so there is none to compute."
        )
    chunk = prompt_chunk_tokens(hf) or end
    for begin in range(first, end, chunk):
        last = min(begin + chunk, end)
        with watched(last - begin), nullcontext() if recompute is None else recompute.whole_sequence_of(length):
            outputs = hf(**_inputs_of_part(hf, request, begin, last), return_dict=True)
        if last < end:
            request.inputs["past_key_values"] = outputs.past_key_values
            del outputs
            yield None
    yield _take(hf, request, outputs)


def _inputs_of_part(hf: Any, request: _Request, begin: int, end: int) -> dict[str, Any]:
    inputs = dict(request.inputs)
    if inputs.get("attention_mask") is not None and not hf.config.is_encoder_decoder:
        inputs["attention_mask"] = inputs["attention_mask"][:, :end]
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"][..., begin:end]
    prepared: dict[str, Any] = hf.prepare_inputs_for_generation(
        request.input_ids[:, begin:end], is_first_iteration=True, **inputs
    )
    return prepared


def _decode(hf: Any, request: _Request, watched: Watched, num_new: int, guesses: Sequence[int]) -> Tensor:
    """The logits ``[1, V]`` after the last tokens, by the model's own methods, which take no guesses."""
    assert not guesses
    if num_new > 1:
        request.inputs = hf._update_model_kwargs_for_generation(
            {}, request.inputs, is_encoder_decoder=hf.config.is_encoder_decoder, num_new_tokens=num_new - 1
        )
    length = num_new if request.inputs["use_cache"] else None
    with watched(0):
        inputs = hf.prepare_inputs_for_generation(request.input_ids, next_sequence_length=length, **request.inputs)
        outputs = hf(**inputs, return_dict=True)
    return _take(hf, request, outputs)


def _take(hf: Any, request: _Request, outputs: Any) -> Tensor:
    request.inputs = hf._update_model_kwargs_for_generation(
        outputs, request.inputs, is_encoder_decoder=hf.config.is_encoder_decoder
    )
    return _last_logits(request, outputs)


def _last_logits(request: _Request, outputs: Any, num_rows: int = 1) -> Tensor:
    """A copy, ``[T, V]``: the logits of a whole prompt may be large."""
    logits: Tensor = outputs.logits
    return logits[0, -num_rows:].to(copy=True, dtype=torch.float32, device=request.input_ids.device)


def _is_short(hf: Any, request: _Request) -> bool:
    """Whether the model's own methods pass the token, its position and the cache, and nothing else."""
    is_usual = all(getattr(getattr(hf, name), "__func__", None) is vars(GenerationMixin)[name] for name in OWN_METHODS)
    cache = request.inputs.get("past_key_values")
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


def _decode_short(hf: Any, request: _Request) -> Compute:
    """The logits of `_decode`, without a call of those methods, and behind each guess, too."""
    inputs, offset = dict(request.inputs), _offset(request)

    def compute(num_new: int, guesses: Sequence[int]) -> Tensor:
        ids = request.input_ids[:, -num_new:]
        inputs["input_ids"] = torch.cat((ids, ids.new_tensor([guesses])), -1) if guesses else ids.contiguous()
        if offset is not None:
            first = request.input_ids.shape[1] - num_new
            inputs["position_ids"] = offset + torch.arange(first, first + num_new + len(guesses), device=offset.device)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 1 + len(guesses)
        return _last_logits(request, hf(**inputs, return_dict=True), 1 + len(guesses))

    return compute


def _offset(request: _Request) -> Tensor | None:
    """From the number of a token in the sequence to its position. None where positions are not given."""
    positions: Tensor | None = request.inputs.get("position_ids")  # up to the first token that is not computed
    return None if positions is None else positions[..., -1:] - request.input_ids.shape[1]


def _counts_positions(request: _Request) -> bool:
    """Whether the position of each token is its number."""
    offset = _offset(request)
    return offset is None or not offset.any()


def _choose(request: _Request, logits: Tensor, random: torch.Generator | None) -> int:
    """Choose the next token and append it to ``input_ids``."""
    scores = logits
    for process in request.processors:  # calling the list itself inspects each one's signature, every time
        scores = process(request.input_ids, scores)
    if request.config.do_sample:
        token = torch.multinomial(scores.softmax(-1), num_samples=1, generator=random)
    else:
        token = scores.argmax(-1, keepdim=True)
    _append(request, token)
    return int(token)


def _append(request: _Request, token: Tensor) -> None:
    request.input_ids = torch.cat((request.input_ids, token), -1)


def _is_over(request: _Request) -> bool:
    return bool(request.criteria(request.input_ids, None).all())
