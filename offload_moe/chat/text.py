"""Token ids to text, one token at a time."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# A character has at most four bytes, so at most four byte tokens; a longer sequence is invalid and is shown as such.
MAX_HELD_TOKENS = 4


class IncrementalText:
    """Decodes a growing sequence; returns text once its characters are whole.

    A token's text depends on its neighbours (leading spaces, bytes of one character), so each token is decoded after
    the previous text's tokens and only the difference is returned.

    Source: the prefix/read offsets of text-generation-inference and vLLM.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        """context: the end of the prompt, on which it depends whether the first word begins with a space."""
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._prefix = 0
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """Append a token; returns the text that it completes, often empty."""
        self._ids.append(token)
        before, now = self._decode(self._prefix, self._read), self._decode(self._prefix, len(self._ids))
        held = len(self._ids) - self._read
        if len(now) <= len(before) or (now.endswith("�") and held < MAX_HELD_TOKENS):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """The rest, whole characters or not."""
        before, now = self._decode(self._prefix, self._read), self._decode(self._prefix, len(self._ids))
        self._prefix, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
