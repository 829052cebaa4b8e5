"""llama.cpp's importance matrices in GGUF form: sums of squared inputs of each matrix, and how many there were.

Source: llama.cpp, tools/imatrix/imatrix.cpp, `save_imatrix`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from offload_moe.checkpoint.gguf_file import GgufTensor, read_gguf
from offload_moe.errors import CheckpointError

SUMS, COUNTS = ".in_sum2", ".counts"
MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True, kw_only=True)
class SquareSums:
    """Of the inputs of one matrix, or of the matrices of all experts: sums ``[E, K]``, counts ``[E]``, fp32."""

    sums: Tensor
    counts: Tensor

    def of_matrices(self, num_matrices: int) -> "SquareSums":
        """The same sums by matrix; a file that was converted from the older form has one count for all matrices."""
        if len(self.counts) > 1 or self.sums.numel() % num_matrices:
            return self
        return SquareSums(sums=self.sums.view(num_matrices, -1), counts=self.counts.expand(num_matrices))

    def means(self, prior: float) -> Tensor:
        """``[E, K]``: mean squares, with as many inputs more as `prior` says that have the mean of all experts."""
        counts = self.counts[:, None]
        of_all = self.sums.sum(0) / self.counts.sum().clamp(min=1)
        return (self.sums + prior * of_all) / (counts + prior)


def read_imatrix(path: Path) -> dict[str, SquareSums]:
    """Name of a tensor, such as ``blk.0.ffn_down_exps.weight`` -> its sums.

    Raises: CheckpointError, TransferError.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not is_gguf:
        raise CheckpointError(
            f"{path} is no importance matrix in GGUF form. An older one (.dat) is converted by llama.cpp's "
            f"`llama-imatrix --in-file {path.name} -o imatrix.gguf`."
        )
    tensors = read_gguf([path]).tensors
    names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
    if not names:
        raise CheckpointError(
            f"{path} is a GGUF file, but no importance matrix: none of its {len(tensors)} tensors is named *{SUMS}."
        )
    return {name: _square_sums(path, name, tensors) for name in names}


def _square_sums(path: Path, name: str, tensors: Mapping[str, GgufTensor]) -> SquareSums:
    pair = tensors[name + SUMS], tensors.get(name + COUNTS)
    if pair[1] is None or any(part is None or part.kind != "F32" for part in pair):
        raise CheckpointError(f"{path}: {name}{SUMS} and {name}{COUNTS} must be there, in F32.")
    sums, counts = (part.rows(0, part.shape[0]) for part in (pair[0], pair[1]))
    if sums.numel() % counts.numel():
        raise CheckpointError(f"{path}: {name} has {sums.numel()} sums and {counts.numel()} counts.")
    if not all(bool((part.isfinite() & (part >= 0)).all()) for part in (sums, counts)):
        raise CheckpointError(f"{path}: {name} has negative, infinite or NaN importances. Compute it again.")
    return SquareSums(sums=sums.view(counts.numel(), -1), counts=counts.flatten())
