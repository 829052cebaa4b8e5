"""Linears over panels on the card, executed on the CPU, and what the library gives for them."""

from dataclasses import dataclass

import numpy as np
import torch

from offload_moe.native import kernels
from tests.support.cuda.card import Card, codec_name, copied, inputs_for
from tests.support.cuda.matrices import Records, make_records, random_rows


def multiply(
    card: Card, records: list[Records], x: np.ndarray, compiled: int, biases: list[np.ndarray | None]
) -> list[np.ndarray]:
    codec, cols = records[0].codec, x.shape[1]
    rows = [each.shape.matrices[0].out_features for each in records]
    outs = [np.full((compiled, count), 5.0, np.float32) for count in rows]
    taken = card.input(codec, cols, compiled)
    card.run("QUANTIZE", (cols,), {"x": copied(x), "inputs": inputs_for(codec, taken)}, y=compiled)
    assert (taken["quants"].reshape(compiled, -1)[len(x) :] == 77).all()
    nested = [nested_scales(each) for each in records]
    params = {
        "input": taken,
        "matrices": [each.matrix(0) | own.place for each, own in zip(records, nested, strict=True)],
        "records": [each.memory[0] for each in records],
        "biases": biases,
        "outs": outs,
        "num_matrices": len(rows),
    }
    card.run("LINEAR", (codec_name(codec), cols, compiled), params, rows=rows)
    return outs


@dataclass(frozen=True, slots=True)
class Nested:
    """The nested scales of nf4 in memory of their own, which ends with the last one; and where that is, to a matrix."""

    memory: np.ndarray
    place: dict[str, int]


def nested_scales(records: Records) -> Nested:
    if records.codec != "nf4":
        return Nested(np.empty(0), {})
    values = copied(records.layout.view(records.tensors[0], "weight.absmax_scale").numpy())
    return Nested(values, {"nested_scales": values.ctypes.data - records.memory[0].ctypes.data})


def expected_of(records: list[Records], x: np.ndarray, biases: list[np.ndarray | None]) -> list[np.ndarray]:
    kernel = kernels.LinearKernel(
        records[0].codec, [r.shape for r in records], [r.layout for r in records], num_parts=1
    )
    outs = [torch.empty(len(x), each.shape.matrices[0].out_features) for each in records]
    kernel.forward(torch.from_numpy(x), [each.tensors[0] for each in records], outs)
    return [out.numpy() if bias is None else out.numpy() + bias for out, bias in zip(outs, biases, strict=True)]


def make_matrices(codec: str, rows: tuple[int, ...], cols: int) -> tuple[list[Records], list[np.ndarray | None]]:
    """The first has a bias in its record, the second one beside it."""
    records = [make_records(codec, [("weight", n, cols)], has_bias=index == 0) for index, n in enumerate(rows)]
    return records, [random_rows(1, n)[0] if index == 1 else None for index, n in enumerate(rows)]
