"""The tokens that a model is calibrated on."""

import os
from codecs import getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from offload_moe.checkpoint.tokenizer import load_tokenizer
from offload_moe.errors import ConfigError
from offload_moe.system.paths import user_path

AUTO = "auto"
BUILT_IN = Path(__file__).with_name("calibration.txt")
NUM_SEQUENCES = 16
NUM_POSITIONS = 512
WINDOW_BYTES = 1 << 16  # read for one sequence of a large file


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """A text's name, and token ids ``[sequences, positions]`` spread over it."""

    name: str
    ids: Tensor

    @property
    def sha256(self) -> str:
        """Of the token ids."""
        return sha256(self.ids.numpy().tobytes()).hexdigest()


def read_calibration_text(text: str | Path, folder: Path) -> CalibrationText:
    """The tokens of a file, or of the built-in text for `AUTO`. folder: of the tokenizer. Raises: ConfigError.

    Of a file larger than all windows together, those alone are read, spread over it.
    """
    path = BUILT_IN if text == AUTO else user_path(text)
    try:
        content = "".join(_windows(path)).replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise ConfigError(f"The calibration text {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The calibration text {path} is not UTF-8: {error}.") from error
    tokenizer, reason = load_tokenizer(folder)
    if tokenizer is None:
        raise ConfigError(f"A calibration text needs the model's tokenizer. {reason}")
    ids: list[int] = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    begin: list[int] = [tokenizer.bos_token_id] if _begins_with_special(tokenizer) else []
    length = NUM_POSITIONS - len(begin)
    count = min(len(ids) // length, NUM_SEQUENCES)
    if not count:
        raise ConfigError(f"{path} has {len(ids)} tokens of this model; calibration needs at least {length}.")
    starts = [index * (len(ids) - length) // max(count - 1, 1) for index in range(count)]
    rows = [begin + ids[start : start + length] for start in starts]
    return CalibrationText(name=AUTO if text == AUTO else path.name, ids=torch.tensor(rows))


def _windows(path: Path) -> Iterator[str]:
    most = NUM_SEQUENCES * WINDOW_BYTES
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes <= most:  # or a pipe, whose size is 0
            content = file.read(most)
            yield _decoded(content, begins=True, ends=len(content) < most)
            return
        for index in range(NUM_SEQUENCES):
            start = index * (num_bytes - WINDOW_BYTES) // (NUM_SEQUENCES - 1)
            file.seek(start)
            yield _decoded(file.read(WINDOW_BYTES), begins=start == 0, ends=start + WINDOW_BYTES == num_bytes)


def _decoded(window: bytes, *, begins: bool, ends: bool) -> str:
    """Without the halves of characters at a cut. begins, ends: whether the text does so here."""
    cut = 0 if begins else next((at for at, byte in enumerate(window[:3]) if byte & 0xC0 != 0x80), 3)
    return getincrementaldecoder("utf-8")().decode(window[cut:], final=ends)


def _begins_with_special(tokenizer: object) -> bool:
    """Whether the tokenizer begins a text with its own token, which the model expects at the first position."""
    ids: list[int] = tokenizer("a").input_ids  # type: ignore[operator]
    return bool(ids) and ids[0] == getattr(tokenizer, "bos_token_id", None)
