"""A file in JSON beside the weights."""

import json
from pathlib import Path
from typing import Any

from offload_moe.errors import CheckpointError


def read_json(path: Path, absent: str) -> Any:
    """What is in the file. absent: the message where there is none. Raises: CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(absent) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Download it again.") from error
