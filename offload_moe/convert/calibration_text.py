"""The tokens that a model is calibrated on."""

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
    """The tokens of a file, or of the built-in text for `AUTO`. folder: of the tokenizer. Raises: ConfigError."""
    path = BUILT_IN if text == AUTO else user_path(text)
    try:
        content = path.read_text(encoding="utf-8")
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
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    rows = [begin + ids[start : start + length] for start in starts]
    return CalibrationText(name=AUTO if text == AUTO else path.name, ids=torch.tensor(rows))


def _begins_with_special(tokenizer: object) -> bool:
    """Whether the tokenizer begins a text with its own token, which the model expects at the first position."""
    ids: list[int] = tokenizer("a").input_ids  # type: ignore[operator]
    return bool(ids) and ids[0] == getattr(tokenizer, "bos_token_id", None)
