"""What the errors of a matrix are weighed by while it is quantized, and the codec that does so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from offload_moe.native.kernels import fast_encoding
from offload_moe.quant import Codec
from offload_moe.quant.moments import NO_MOMENTS, Moments
from offload_moe.store.manifest import Importances

WEIGHED = ("nf4", "int8")  # the other codecs have no choice of scales


class Weighing(Protocol):
    """The moments of the inputs of every matrix that is quantized."""

    @property
    def importances(self) -> Importances | None:
        """For the manifest."""
        ...

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Called once before moments are needed. settings: of the conversion, equal when it is resumed."""

    def of_expert(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> Moments:
        """Moments of each matrix of an expert.

        layer: its ordinal. tensors: the expert's own, in the module's layout.
        """
        ...

    def of_linear(self, name: str) -> Moments:
        """Moments of `weight` of the module of that name."""
        ...

    def remove(self) -> None:
        """Delete what was kept on the disk."""


class Unweighed:
    """Every error counts the same."""

    importances: Importances | None = None

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Nothing is needed."""

    def of_expert(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> Moments:
        return NO_MOMENTS

    def of_linear(self, name: str) -> Moments:
        return NO_MOMENTS

    def remove(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How matrices of one kind are quantized. scales: see `fast_encoding`."""

    codec: Codec
    scales: str
    weighing: Weighing

    def of_expert(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> Codec:
        """The codec of one expert."""
        moments = self.weighing.of_expert(layer, expert, tensors) if self.codec.name in WEIGHED else NO_MOMENTS
        return fast_encoding(self.codec, self.scales, moments)

    def of_linear(self, name: str) -> Codec:
        """The codec of one dense linear."""
        return fast_encoding(self.codec, self.scales, self.weighing.of_linear(name))
