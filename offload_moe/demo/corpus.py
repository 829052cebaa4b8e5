"""The calibration text that ships with the package; `docs/decisions/010-demo-model.md` says where it comes from."""

from importlib.resources import files

import torch
from torch import Tensor

_DOCUMENT_BREAK = "\n\f\n"
_END_OF_TEXT = "<|endoftext|>"


def corpus_bytes() -> bytes:
    """The shipped text as it lies in the package."""
    return files("offload_moe.demo").joinpath("calibration.txt").read_bytes()


def pack_documents(tokenizer: str, documents: list[str], num_positions: int) -> Tensor:
    """Token ids [sequences, `num_positions`] of the documents, one after another; `tokenizer` is `tokenizer.json`."""
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_str(tokenizer).encode_batch([document + _END_OF_TEXT for document in documents])
    ids = torch.tensor([number for document in encoded for number in document.ids])
    num_sequences = len(ids) // num_positions
    return ids[: num_sequences * num_positions].view(num_sequences, num_positions)


def calibration_ids(tokenizer: str, num_sequences: int, num_positions: int) -> Tensor:
    """The first `num_sequences` sequences of the calibration text, [`num_sequences`, `num_positions`]."""
    documents = corpus_bytes().decode("utf-8").split(_DOCUMENT_BREAK)
    return pack_documents(tokenizer, documents, num_positions)[:num_sequences]


def vocabulary_ids(vocab_size: int, num_sequences: int, num_positions: int, generator: torch.Generator) -> Tensor:
    """Different tokens in random order, [`num_sequences`, `num_positions`]."""
    order = torch.randperm(vocab_size, generator=generator)
    return order[: num_sequences * num_positions].view(num_sequences, num_positions)
