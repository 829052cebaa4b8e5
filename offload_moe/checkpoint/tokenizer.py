"""The tokenizer of a folder, or why there is none: a checkpoint's code is never run, and some formats need packages."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TOKENIZER_JSON = "tokenizer.json"
# Formats that transformers reads through packages of their own, which the extra installs.
SENTENCEPIECE, TIKTOKEN = ("*.model", "*.spm"), ("*.tiktoken", "tiktoken.model")
PACKAGES = ("sentencepiece", "protobuf", "tiktoken")
INSTALL = "pip install 'offload-moe[tokenizers]'"


def load_tokenizer(folder: Path) -> tuple[Any, str]:
    """The tokenizer, or None and why there is none.

    Where its config asks for remote code, `tokenizer.json` is enough: it says all that is needed.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), ""
    except Exception as error:  # whatever a tokenizer class makes of absent or foreign files
        reason = str(error).strip() or type(error).__name__
    if asks_for_code(folder) and (folder / TOKENIZER_JSON).is_file():
        try:
            return PreTrainedTokenizerFast.from_pretrained(folder), ""
        except Exception as error:  # as above
            reason = str(error).strip() or type(error).__name__
    return None, obstacle(folder) or _unreadable(folder, reason.splitlines()[0])


def obstacle(folder: Path) -> str | None:
    """What would keep a tokenizer from being loaded, as far as its files tell."""
    if (folder / TOKENIZER_JSON).is_file():
        return None
    if asks_for_code(folder):
        return (
            "The tokenizer asks for remote code (auto_map), and code from a checkpoint is never run: put a "
            "tokenizer.json of this model beside the weights."
        )
    found = sorted(path.name for pattern in (*SENTENCEPIECE, *TIKTOKEN) for path in folder.glob(pattern))
    if found and not all(map(_is_installed, PACKAGES)):
        return (
            f"The tokenizer is in {found[0]} only, which needs packages that are not installed: {INSTALL}, or put a "
            "tokenizer.json of this model beside the weights."
        )
    return None


def asks_for_code(folder: Path) -> bool:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return "AutoTokenizer" in config.get("auto_map", {})
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _unreadable(folder: Path, reason: str) -> str:
    patterns = ("tokenizer*", "vocab*", "tekken*", *SENTENCEPIECE, *TIKTOKEN)
    names = sorted({path.name for pattern in patterns for path in folder.glob(pattern)} - {"tokenizer_config.json"})
    if not names:
        return "The model has no tokenizer: put a tokenizer.json of this model beside the weights."
    return (
        f"The tokenizer ({', '.join(names)}) cannot be read: {reason.rstrip('.')}. Put a tokenizer.json of this model "
        "beside the weights."
    )
