"""Records in panels on a device: prompts copy them to rows, as many at once as are decoded at once."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload_moe.native import device
from offload_moe.native.kernels import panel_order
from offload_moe.quant import Codec, ExpertShape, Matrix, get_codec
from offload_moe.quant.gguf import GgufCodec
from offload_moe.quant.panels import from_panels, rows_of_parts, to_panels
from tests.support.gguf_records import random_rows


@pytest.mark.parametrize(("rows", "count"), [(16, 4), (48, 3), (37, 5), (7, 2)])
def test_panels_and_back(rows: int, count: int) -> None:
    elements = torch.randint(0, 1 << 30, (rows, count), dtype=torch.int32)
    panels = to_panels(elements)
    assert torch.equal(from_panels(panels, rows), elements)
    assert rows < 16 or not torch.equal(panels.view(rows, count), elements)


@pytest.mark.parametrize(("size", "num_parts"), [(48, 1), (37, 1), (37, 2), (7, 2)])
def test_some_rows_of_a_matrix_of_parts(size: int, num_parts: int) -> None:
    elements = torch.randint(0, 1 << 30, (num_parts * size, 3), dtype=torch.int32)
    panels = torch.cat([to_panels(part) for part in elements.chunk(num_parts)])
    for first in range(0, len(elements), 5):
        for last in range(first + 1, len(elements) + 1, 2):
            found = rows_of_parts(panels, len(elements), num_parts, slice(first, last))
            assert torch.equal(found, elements[first:last])


TILE_WEIGHTS = 128 * 256
MATRICES = {"gate_up_proj": (1200, 256), "down_proj": (500, 256), "weight": (700, 256)}


class Greatest(TorchDispatchMode):
    """The greatest number of bytes that an operation has made, views left out."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.num_bytes = max(self.num_bytes, out.nbytes)
        return out


@pytest.mark.parametrize(
    ("codec_name", "names"),
    [
        *((codec, names) for codec in ("nf4", "int8", "mxfp4") for names in (MATRICES.keys() - {"weight"}, {"weight"})),
        ("gguf:Q4_K,Q4_K,Q6_K", MATRICES.keys() - {"weight"}),
        ("gguf:MXFP4,MXFP4,Q8_0", MATRICES.keys() - {"weight"}),
        ("gguf:Q6_K", {"weight"}),
    ],
)
def test_a_record_in_panels_gives_the_bits_of_rows_and_is_never_copied_as_a_whole(
    codec_name: str, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = get_codec(codec_name)
    matrices = [Matrix(name=name, out_features=MATRICES[name][0], in_features=MATRICES[name][1]) for name in MATRICES]
    shape = ExpertShape(matrices=tuple(matrix for matrix in matrices if matrix.name in names))
    record, order = record_of(codec, shape), panel_order(codec_name, shape)
    assert order is not None
    panels = record.clone()
    order.to_panels(panels)
    before = panels.clone()
    assert not torch.equal(panels, record)
    monkeypatch.setattr(device, "TILE_WEIGHTS", TILE_WEIGHTS)
    for matrix in shape.matrices:
        x = torch.randn(2, matrix.in_features)
        expected = device.RecordLinear(shape, codec, matrix.name)(x, record)
        with Greatest() as greatest:
            found = device.RecordLinear(shape, codec, matrix.name, in_panels=True)(x, panels)
        assert torch.equal(found, expected)
        assert greatest.num_bytes <= 2 * TILE_WEIGHTS * 4
    assert torch.equal(panels, before)


def record_of(codec: Codec, shape: ExpertShape) -> torch.Tensor:
    """In rows, of random weights."""
    if isinstance(codec, GgufCodec):
        parts = codec.parts(shape)
        rows = {part.plane: random_rows(part.kind.name, part.num_rows, part.matrix.in_features) for part in parts}
        return codec.encode(shape, {name: torch.from_numpy(values) for name, values in rows.items()})
    sizes = {matrix.name: (matrix.out_features, matrix.in_features) for matrix in shape.matrices}
    return codec.encode(shape, {name: torch.randn(size) for name, size in sizes.items()})
