"""GGUF's types on a device, executed on the CPU: the bytes and the numbers that the library and `gguf` give."""

import numpy as np
import pytest
import torch

from offload_moe.native import device as native_device
from offload_moe.native import kernels
from offload_moe.native.device import keeps_module_order, record_linear
from offload_moe.quant import ExpertShape, Matrix
from offload_moe.quant.gguf import TYPES, decode_rows, gguf_codec
from offload_moe.quant.gguf_device import ON_DEVICE, decode_on_device, rows_of_panels
from tests.support.gguf_records import GgufMatrix, random_rows, spoil_blocks


@pytest.mark.parametrize("kind", sorted(ON_DEVICE))
@pytest.mark.parametrize("rows", [16, 37])
def test_panels_back_to_the_order_of_a_file(kind: str, rows: int) -> None:
    matrix = GgufMatrix(kind, rows, 512)
    for tile in (slice(0, rows), slice(5, 16), slice(13, rows)):
        found = rows_of_panels(TYPES[kind], matrix.in_panels()[: matrix.raw.size], rows, tile)
        assert np.array_equal(found.numpy(), matrix.raw[tile])
    assert kernels.panel_order(matrix.codec.name, matrix.shape) is not None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinite scales
@pytest.mark.parametrize("kind", sorted(ON_DEVICE))
def test_numbers_are_those_of_gguf(kind: str) -> None:
    matrix = GgufMatrix(kind, 19, 512)
    for _ in range(2):
        rows = torch.from_numpy(matrix.raw)
        expected = decode_rows(TYPES[kind], rows)
        found = decode_on_device(TYPES[kind], rows)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))
        if kind != "MXFP4":
            spoil_blocks(kind, matrix.raw)
    if kind == "MXFP4":
        for exponent in (0, 1, 2, 3, 127, 200, 250):
            matrix.raw[:, 0] = exponent
            rows = torch.from_numpy(matrix.raw)
            assert torch.equal(decode_on_device(TYPES[kind], rows), decode_rows(TYPES[kind], rows))


def test_a_matrix_is_decoded_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a device's arithmetic, with the rows of gate before those of up."""
    monkeypatch.setattr(native_device, "TILE_WEIGHTS", 7 * 256)
    codec, seed = gguf_codec(["Q4_K", "Q6_K", "Q8_0"]), torch.Generator().manual_seed(0)
    matrices = (
        Matrix(name="gate_up_proj", out_features=40, in_features=256),
        Matrix(name="down_proj", out_features=256, in_features=64),
    )
    shape = ExpertShape(matrices=matrices, biases=(("gate_up_proj_bias", 40),))
    values = {
        part.plane: torch.from_numpy(random_rows(part.kind.name, part.num_rows, part.matrix.in_features))
        for part in codec.parts(shape)
    }
    record = codec.encode(shape, values | {"gate_up_proj_bias": torch.linspace(-1, 1, 40)})
    x = torch.randint(-3, 4, (3, 256), generator=seed).float()
    expected = x @ codec.matrix(shape, record, "gate_up_proj").T + torch.linspace(-1, 1, 40)
    found = record_linear(x, record, shape, codec, "gate_up_proj")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not keeps_module_order(codec)
