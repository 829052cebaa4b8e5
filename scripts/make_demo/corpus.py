"""Texts as sequences of tokens; `docs/decisions/010-demo-model.md` says where the texts come from."""

import torch
from torch import Tensor

DOCUMENT_BREAK = "\n\f\n"
_END_OF_TEXT = "<|endoftext|>"


def pack_documents(tokenizer: str, documents: list[str], num_positions: int) -> Tensor:
    """Token ids [sequences, `num_positions`] of the documents, one after another; `tokenizer` is `tokenizer.json`."""
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_str(tokenizer).encode_batch([document + _END_OF_TEXT for document in documents])
    ids = torch.tensor([number for document in encoded for number in document.ids])
    num_sequences = len(ids) // num_positions
    return ids[: num_sequences * num_positions].view(num_sequences, num_positions)


def vocabulary_ids(vocab_size: int, num_sequences: int, num_positions: int, generator: torch.Generator) -> Tensor:
    """Different tokens in random order, [`num_sequences`, `num_positions`]."""
    order = torch.randperm(vocab_size, generator=generator)
    return order[: num_sequences * num_positions].view(num_sequences, num_positions)
