"""The tokenizer of a folder, or the reason for its absence: remote code is never run, some formats need packages."""

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from offload_moe.checkpoint.token_ids import num_embeddings
from offload_moe.families.text_model import TextModel

TOKENIZER_JSON = "tokenizer.json"
JSON_FILES = (TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Formats that transformers reads through additional packages, which the extra installs.
PACKAGES_OF = {
    "tiktoken.model": ("tiktoken",),
    "*.tiktoken": ("tiktoken",),
    "*.model": ("sentencepiece", "protobuf"),
    "*.spm": ("sentencepiece", "protobuf"),
}
INSTALL = "pip install 'offload-moe[tokenizers]'"


def load_tokenizer(folder: Path) -> tuple[Any, str]:
    """The tokenizer, or None and the reason.

    If its config names remote code, `tokenizer.json` is used alone, which is sufficient.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), ""
    except Exception as error:  # a tokenizer class may raise anything for missing or foreign files
        reason = str(error).strip() or type(error).__name__
    if asks_for_code(folder) and (folder / TOKENIZER_JSON).is_file():
        try:
            return PreTrainedTokenizerFast.from_pretrained(folder), ""
        except Exception as error:  # as above
            reason = str(error).strip() or type(error).__name__
    return None, obstacle(folder) or _unreadable(folder, reason.splitlines()[0])


def obstacle(folder: Path) -> str | None:
    """The reason why a tokenizer cannot be loaded, as far as its files show it."""
    if (folder / TOKENIZER_JSON).is_file():
        return None
    if asks_for_code(folder):
        return (
            "The tokenizer needs remote code (auto_map), and code from a checkpoint is never run: put a "
            "tokenizer.json of this model beside the weights."
        )
    found = [(path.name, packages) for pattern, packages in PACKAGES_OF.items() for path in folder.glob(pattern)]
    if not found:
        return None
    name, packages = found[0]
    missing = [package for package in packages if not is_installed(package)]
    if not missing:
        return None
    return (
        f"The tokenizer is in {name} only, which needs packages that are not installed ({', '.join(missing)}): "
        f"{INSTALL}, or put a tokenizer.json of this model beside the weights."
    )


def damaged_file(folder: Path) -> str | None:
    """The error of a tokenizer file that is not a JSON object, as after an incomplete download."""
    for path in (folder / name for name in JSON_FILES):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            reason = f"it cannot be read ({error})"
        else:
            if isinstance(content, dict):
                continue
            reason = f"it holds a {type(content).__name__} instead of an object"
        return f"{path} is damaged: {reason}. Download it again, or delete it to go on without a tokenizer."
    return None


def tokenizer_notices(tokenizer: Any, model: TextModel) -> list[str]:
    """Notices about parts of a tokenizer that cannot be used with this model."""
    return [text for text in (_tokens_beyond(tokenizer, num_embeddings(model)), _template_fault(tokenizer)) if text]


def _tokens_beyond(tokenizer: Any, num_rows: int) -> str | None:
    with suppress(NotImplementedError):  # tokenizers without such a table
        if max((tokenizer.vocab_size - 1, *tokenizer.added_tokens_decoder)) < num_rows:
            return None
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= num_rows)
    if not beyond:
        return None
    token_id, token = beyond[0]
    return (
        f"The tokenizer has {len(beyond):,} tokens beyond the {num_rows:,} rows of the model's embedding, such as "
        f"{token!r} ({token_id}): a text with one of them is refused. The model was not resized for them."
    )


def _template_fault(tokenizer: Any) -> str | None:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            if template is not None:
                _compile_jinja_template(template)
        except TemplateError as error:
            return f"The model's chat template cannot be used ({error}): only raw texts can be continued (--raw)."
    return None


def asks_for_code(folder: Path) -> bool:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return "AutoTokenizer" in config.get("auto_map", {})
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def is_installed(package: str) -> bool:
    """Whether a package of that name is there, in any version."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _unreadable(folder: Path, reason: str) -> str:
    patterns = ("tokenizer*", "vocab*", "tekken*", *PACKAGES_OF)
    names = sorted({path.name for pattern in patterns for path in folder.glob(pattern)} - {"tokenizer_config.json"})
    if not names:
        return "The model has no tokenizer: put a tokenizer.json of this model beside the weights."
    return (
        f"The tokenizer ({', '.join(names)}) cannot be read: {reason.rstrip('.')}. Put a tokenizer.json of this model "
        "beside the weights."
    )
