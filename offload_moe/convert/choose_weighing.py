"""From the options of a conversion to what its errors are weighed by."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.token_ids import check_ids, num_embeddings
from offload_moe.convert.calibration import Calibration, Kind
from offload_moe.convert.calibration_text import read_calibration_text
from offload_moe.convert.imatrix import ImportanceMatrix
from offload_moe.convert.inputs_folder import InputsFolder
from offload_moe.convert.jobs import linear_shapes
from offload_moe.convert.weighing import WEIGHED, Unweighed, Weighing
from offload_moe.errors import ConfigError
from offload_moe.quant import LEAST_ERROR, SCALES
from offload_moe.store.beside import beside
from offload_moe.system.names import INPUTS
from offload_moe.system.paths import user_path
from offload_moe.system.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class WeighingOptions:
    """The options of a conversion that weigh its errors: at most one of them.

    imatrix: a file of importances. calibrate: a text, or "auto".
    """

    imatrix: str | Path | None = None
    calibrate: str | Path | None = None

    def check(self, *, scales: str, deletes_shards: bool) -> None:
        """Check options before anything is read. Raises: ConfigError for those that exclude each other."""
        if scales not in SCALES:
            raise ConfigError(f"Unknown scales {scales!r}. Choose one of: {', '.join(SCALES)}.")
        if self._flag is None:
            return
        if self.imatrix is not None and self.calibrate is not None:
            raise ConfigError("Errors are weighed by one of --imatrix and --calibrate. Leave the other out.")
        if scales != LEAST_ERROR:
            raise ConfigError(f"{self._flag} weighs the errors of scales; --scales {scales} has no choice of them.")
        if deletes_shards and self.calibrate is not None:
            raise ConfigError(
                "--calibrate runs the whole model before it is quantized. Leave --delete-source-shards out, or use "
                "--imatrix."
            )

    def open(
        self,
        checkpoint: Checkpoint,
        codec: str,
        dense_codec: str,
        target: Path,
        progress: Progress,
        on_notice: Callable[[str], None],
    ) -> Weighing:
        """The weighing of one conversion.

        Raises: ConfigError where nothing would be weighed, and for a text with tokens that have no embedding;
            CheckpointError for importances of another model.
        """
        if self._flag is None:
            return Unweighed()
        if codec not in WEIGHED and dense_codec not in WEIGHED:
            raise ConfigError(
                f"{self._flag} weighs the errors of {' and '.join(WEIGHED)}, and the experts are kept in {codec}. "
                "Choose --codec nf4, or leave it out."
            )
        linears = tuple(linear_shapes(checkpoint)) if dense_codec in WEIGHED else ()
        if self.imatrix is not None:
            importances = ImportanceMatrix(user_path(self.imatrix), checkpoint, linears)
            for notice in importances.notices:
                on_notice(notice)
            return importances
        assert self.calibrate is not None
        text = read_calibration_text(self.calibrate, checkpoint.folder)
        check_ids(
            text.ids.unique().tolist(), num_embeddings(checkpoint.model), text=f"The calibration text {text.name}"
        )
        return Calibration(
            checkpoint,
            text,
            linears,
            InputsFolder(beside(target, INPUTS), progress),
            feeds_back=[kind for kind, name in _kinds(codec, dense_codec) if name == "nf4"],
        )

    @property
    def _flag(self) -> str | None:
        if self.imatrix is not None:
            return "--imatrix"
        return "--calibrate" if self.calibrate is not None else None


def _kinds(codec: str, dense_codec: str) -> tuple[tuple[Kind, str], ...]:
    return ("experts", codec), ("linears", dense_codec)
