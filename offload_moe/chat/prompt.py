"""Text and tokens for a single prompt, whole or as a stream.

For conversations of several turns see `offload_moe.chat.ChatSession`.
"""

import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Unpack

import torch
from transformers import Cache, PreTrainedTokenizerBase

from offload_moe.chat.generation import DEFAULT_MAX_NEW_TOKENS
from offload_moe.chat.reasoning import Piece
from offload_moe.chat.sampling import Sampling, SamplingArguments
from offload_moe.chat.session import ChatSession
from offload_moe.chat.stream import TokenStream
from offload_moe.chat.template import PromptFormat, model_stop_ids
from offload_moe.checkpoint.token_ids import check_ids, num_embeddings
from offload_moe.errors import ConfigError
from offload_moe.families.text_model import TextModel
from offload_moe.speculate.speculation import speculation_of

Prompt = str | Sequence[Mapping[str, str]]


def generate(
    hf: TextModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    raw: bool = False,
    **sampling: Unpack[SamplingArguments],
) -> str:
    """The whole answer to a prompt or a list of messages, without its reasoning. Settings: see `Sampling`."""
    return "".join(stream(hf, tokenizer, prompt, raw=raw, **sampling))


def stream(
    hf: TextModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    raw: bool = False,
    **sampling: Unpack[SamplingArguments],
) -> Generator[str, None, None]:
    """The answer piece by piece, without its reasoning. `raw` continues the text instead of answering it."""
    for piece in stream_pieces(hf, tokenizer, prompt, raw=raw, **sampling):
        if piece.kind == "answer":
            yield piece.text


def stream_pieces(
    hf: TextModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    raw: bool = False,
    **sampling: Unpack[SamplingArguments],
) -> Generator[Piece, None, None]:
    """The answer and the reasoning piece by piece.

    Raises:
        ConfigError: a setting is out of range, or the prompt is longer than the model's context.
    """
    return ChatSession(hf, tokenizer, raw=raw).send(prompt, **sampling)


def stream_tokens(
    hf: TextModel,
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: torch.Tensor,
    *,
    cache: Cache | None = None,
    stop_event: threading.Event | None = None,
    **sampling: Unpack[SamplingArguments],
) -> TokenStream:
    """Token ids of one sequence as they are chosen, stop token included. Close it, or use it in a `with` statement.

    Args:
        input_ids: [1, T], the whole sequence, also where `cache` holds its beginning.
        sampling: see `Sampling`.

    Raises:
        ConfigError: a setting is out of range, `input_ids` has no token, or one is none of the embedding's rows.
    """
    if input_ids.numel() == 0:
        raise ConfigError("The prompt has no tokens, so there is nothing to continue. Give at least one.")
    settings = Sampling.of(sampling)
    check_ids(input_ids.flatten().tolist(), num_embeddings(hf), tokenizer)
    stop_ids = model_stop_ids(hf, None) if tokenizer is None else PromptFormat(hf, tokenizer).stop_ids
    max_new_tokens = settings.max_new_tokens or hf.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    config = settings.generation_config(hf, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
    return TokenStream(
        hf,
        input_ids,
        config,
        cache=cache,
        tokenizer=tokenizer,
        seed=settings.seed,
        stop_event=stop_event,
        speculator=speculation_of(hf).conversation(settings.speculate),
    )
