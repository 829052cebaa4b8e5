"""The experts of one layer on the card, executed on the CPU, and what the library gives for them.

T rows, R the rows that kernels are compiled for, H hidden, I intermediate, K experts of a row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offload_moe.native import kernels
from tests.support.cuda.card import MODE, Card, codec_name, copied, inputs_for
from tests.support.cuda.matrices import Records, make_records

WEIGHT_SCALE = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A layer's experts in small. are_scaled: weights multiply what they are given."""

    codec: str
    hidden: int
    intermediate: int
    top_k: int
    num_experts: int = 6
    activation: str = "silu"
    has_gate: bool = True
    has_bias: bool = False
    compiled: int = 1
    are_scaled: bool = False

    def kernels(self) -> list[tuple[Any, ...]]:
        inputs = "SCALE" if self.are_scaled else "QUANTIZE"
        return [(inputs, self.hidden), ("FIRST", *self.first_sizes), ("SECOND", *self.second_sizes)]

    @property
    def first_sizes(self) -> tuple[Any, ...]:
        activation = f"OM_{self.activation.upper()}"
        sizes = (self.hidden, self.intermediate, self.compiled, activation, int(self.has_gate))
        return (codec_name(self.codec), *sizes)

    @property
    def second_sizes(self) -> tuple[Any, ...]:
        return (codec_name(self.codec, -1), self.intermediate, self.hidden, self.compiled)

    def records(self) -> Records:
        parts = 2 if self.has_gate else 1
        sizes = [
            ("gate_up_proj", parts * self.intermediate, self.hidden),
            ("down_proj", self.hidden, self.intermediate),
        ]
        return make_records(self.codec, sizes, count=self.num_experts, num_parts=parts, has_bias=self.has_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a router chose: ids and weights ``[T, K]``, in its order."""

    ids: np.ndarray
    weights: np.ndarray


def choose(family: Family, num_rows: int, *, seed: int = 0) -> Choice:
    """Random experts, of which rows share some."""
    random = np.random.default_rng([seed, num_rows, family.hidden])
    ids = np.stack([random.permutation(family.num_experts)[: family.top_k] for _ in range(num_rows)])
    return Choice(ids=ids.astype(np.int32), weights=random.random(ids.shape).astype(np.float32) + np.float32(0.1))


def library_rows(family: Family, records: Records, x: np.ndarray, choice: Choice) -> np.ndarray:
    """``[T, H]``: each row's sum, by the native library."""
    kernel = kernels.ExpertKernel(
        *(records.codec, records.shape, records.layout),
        activation=family.activation,
        has_gate=family.has_gate,
        in_panels=True,
    )
    if family.are_scaled:
        return _scaled_rows(kernel, records, x, choice)
    chosen, offsets, tokens, weights = sorted(set(choice.ids.flat)), [0], [], []
    for expert in chosen:
        for row, place in np.argwhere(choice.ids == expert):
            tokens.append(int(row))
            weights.append(float(choice.weights[row, place] * np.float32(WEIGHT_SCALE)))
        offsets.append(len(tokens))
    out = torch.empty(x.shape)
    kernel.forward(torch.from_numpy(x), [records.tensors[e] for e in chosen], offsets, tokens, weights, out)
    return out.numpy()


def _scaled_rows(kernel: kernels.ExpertKernel, records: Records, x: np.ndarray, choice: Choice) -> np.ndarray:
    """A row for each pair, and each token's results from +0 by ascending id."""
    total = torch.zeros(x.shape)
    for row, (ids, weights) in enumerate(zip(choice.ids, choice.weights, strict=True)):
        for place in np.argsort(ids):
            scaled = torch.from_numpy(x[row] * (weights[place] * np.float32(WEIGHT_SCALE)))[None]
            out = torch.empty(1, x.shape[1])
            kernel.forward(scaled, [records.tensors[ids[place]]], [0, 1], [0], [1.0], out)
            total[row] += out[0]
    return total.numpy()


class CardExperts:
    """The kernels of a layer's experts, launched one after another."""

    def __init__(
        self, family: Family, records: Records, wanted: list[tuple[Any, ...]], num_rows: int, seed: int
    ) -> None:
        self.family, self.records = family, records
        self.card = Card(wanted, num_rows, seed=seed)
        compiled, pairs = family.compiled, family.compiled * family.top_k
        self.input = self.card.input(family.codec, family.hidden, pairs if family.are_scaled else compiled)
        self.hidden = self.card.input(family.codec, family.intermediate, pairs)
        self.pairs = np.full((compiled, family.top_k, family.hidden), 5.0, np.float32)

    def addresses(self, choice: Choice, present: np.ndarray | None = None) -> np.ndarray:
        """Of the records ``[T, K]``; 0 where `present` is false."""
        table = np.array([memory.ctypes.data for memory in self.records.memory], np.uint64)[choice.ids]
        return table if present is None else np.where(present, table, np.uint64(0))

    def quantize(self, x: np.ndarray) -> None:
        inputs = inputs_for(self.family.codec, self.input)
        self.card.run("QUANTIZE", (self.family.hidden,), {"x": copied(x), "inputs": inputs}, y=self.family.compiled)

    def scale(self, x: np.ndarray, choice: Choice) -> None:
        """In place of `quantize` where inputs are scaled."""
        family = self.family
        inputs = inputs_for(family.codec, self.input)
        weights = self._padded(choice.weights)
        params = {"x": copied(x), "weights": weights, "weight_scale": WEIGHT_SCALE, "top_k": family.top_k}
        self.card.run("SCALE", (family.hidden,), {**params, "inputs": inputs}, y=family.compiled * family.top_k)

    def compute(self, choice: Choice, addresses: np.ndarray, *, stride: int | None = None) -> None:
        """The pairs whose address is not 0, into `pairs`, of which a row has `stride` parts."""
        family = self.family
        table = self._padded(addresses, behind=self.records.memory[0].ctypes.data)
        shared = {"addresses": table, "hidden": self.hidden, "top_k": family.top_k}
        matrix, *up, second_matrix = self.records.matrices()
        first = {"input": self.input, "matrix": matrix, "up": (up or [{}])[0], "alpha": 1.702, "limit": 7.0}
        first["pairs_of_input"] = 1 if family.are_scaled else family.top_k
        self.card.run("FIRST", family.first_sizes, {**shared, **first}, y=family.compiled * family.top_k)
        second = {
            "matrix": second_matrix,
            "ids": self._padded(choice.ids),
            **({} if family.are_scaled else {"weights": self._padded(choice.weights)}),
            "pairs": self.pairs,
            "weight_scale": WEIGHT_SCALE,
            "stride": stride or family.top_k,
        }
        self.card.run("SECOND", family.second_sizes, {**shared, **second}, y=family.compiled * family.top_k)

    def sums(self) -> np.ndarray:
        """``[T, H]``: pairs added up from +0 in their order."""
        out = np.zeros_like(self.pairs[:, 0])
        for place in range(self.family.top_k):
            out = out + self.pairs[:, place]
        return out[: self.card.num_rows]

    def _padded(self, values: np.ndarray, *, behind: int = 0) -> np.ndarray:
        """Of pairs ``[T, K]``. Behind them lie others, of no row; nothing where accesses to those are looked for."""
        if MODE == "asan":
            return copied(values)
        others = np.full((self.family.compiled - len(values), self.family.top_k), behind, values.dtype)
        return copied(np.concatenate([values, others]))
