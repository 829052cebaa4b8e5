"""The small files of a model folder for its store, read and checked before the weights are converted."""

from dataclasses import dataclass
from pathlib import Path

from offload_moe.checkpoint.generation import GENERATION_CONFIG, load_generation_config
from offload_moe.checkpoint.source import metadata_files
from offload_moe.checkpoint.tokenizer import damaged_file, load_tokenizer, tokenizer_notices
from offload_moe.errors import CheckpointError
from offload_moe.families.text_model import TextModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallFiles:
    """The small files of a store.

    contents: by name relative to the folder. notices: for the user.
    """

    contents: dict[str, bytes]
    notices: tuple[str, ...]


def read_small_files(folder: Path, model: TextModel) -> SmallFiles:
    """Read and check the small files of a model folder.

    model: the skeleton, for checks against it.

    Raises: CheckpointError for a file that cannot be read, or one of the tokenizer that is damaged.
    """
    contents = {}
    for name, path in metadata_files(folder).items():
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    _, notice = load_generation_config(folder, model)
    if notice is not None:
        contents.pop(GENERATION_CONFIG, None)
    tokenizer, reason = load_tokenizer(folder)
    if tokenizer is None and (damage := damaged_file(folder)) is not None:
        raise CheckpointError(damage)
    found = [reason] if tokenizer is None else tokenizer_notices(tokenizer, model)
    return SmallFiles(contents=contents, notices=tuple(text for text in (notice, *found) if text))
