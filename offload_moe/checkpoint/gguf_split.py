"""The parts of a GGUF file that was split: `-00001-of-00003` and so on."""

import re
from pathlib import Path

from offload_moe.errors import CheckpointError

PART = re.compile(r"(?P<model>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.gguf")
MAX_PARTS = 10_000


def is_gguf(path: Path) -> bool:
    """Whether the path is a file with the name of a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def model_name(path: Path) -> str:
    """The name of a GGUF file's model: the file's own, without its ending and the number of its part."""
    match = PART.fullmatch(path.name)
    return path.stem if match is None else match["model"]


def parts_beside(path: Path) -> tuple[Path, ...]:
    """All parts of the model that a GGUF file is a part of, in order; the file itself if it is whole.

    Raises: CheckpointError naming the parts that are missing.
    """
    match = PART.fullmatch(path.name)
    if match is None:
        return (path,)
    model, digits, count = match["model"], len(match["number"]), int(match["count"])
    if not 0 < count <= MAX_PARTS:
        raise CheckpointError(f"{path}: {count} parts of one GGUF file are not meant.")
    paths = [path.with_name(f"{model}-{number:0{digits}d}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path.parent}: of the {count} parts of this GGUF file {len(missing)} are missing: "
            f"{', '.join(missing[:3])}{more}. Download them into this folder."
        )
    return tuple(paths)
