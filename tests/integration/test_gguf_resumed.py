"""A GGUF file that is quantized anew, stopped and resumed: the store of an undisturbed conversion."""

import os
from pathlib import Path
from typing import Any

import pytest

from offload_moe.convert.calibration_text import BUILT_IN
from offload_moe.convert.quantize import quantize
from offload_moe.errors import StoreError
from offload_moe.store.journal import JOURNAL_NAME
from tests.support.gguf_models import write_model


class Stopped(BaseException):
    """Ends a conversion from within its progress report."""


def stop(phase: str, done: float = -1.0, total: float | None = None) -> None:
    if phase in ("Calibrating", "Quantizing") and done > 0:
        raise Stopped


def stopped(source: Path, store: Path, **options: Any) -> list[str]:
    """Begin a conversion; returns what lies beside the source then."""
    with pytest.raises(Stopped):
        quantize(source, store, **options, progress=stop)
    assert (store / JOURNAL_NAME).is_file()
    return sorted(path.name for path in store.parent.iterdir())


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf"), "mixtral", "Q8_0", num_hidden_layers=1).path


@pytest.mark.parametrize("options", [{"codec": "nf4"}, {"codec": "int8", "dense_codec": "int8"}, {}])
def test_a_stopped_conversion_is_resumed(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    stopped(source, tmp_path / "store", **options)
    assert content(quantize(source, tmp_path / "store", **options)) == content(
        quantize(source, tmp_path / "undisturbed", **options)
    )


def test_so_is_a_stopped_calibration(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(BUILT_IN.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    assert stopped(source, tmp_path / "store", codec="nf4", calibrate=text) == [
        *("store", "store.calibration", "text.txt"),
    ]
    store = quantize(source, tmp_path / "store", codec="nf4", calibrate=text)
    assert content(store) == content(quantize(source, tmp_path / "undisturbed", codec="nf4", calibrate=text))


def test_another_file_of_that_name_does_not_resume(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(source.read_bytes())
    stopped(file, tmp_path / "store", codec="nf4")
    os.utime(file, (1, 1))
    with pytest.raises(StoreError, match="begun with another state of the source files"):
        quantize(file, tmp_path / "store", codec="nf4")
