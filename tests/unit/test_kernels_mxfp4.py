"""The MXFP4 kernels on records made by hand: low nibble first, one power of two per 32 weights."""

import pytest
import torch

from offload_moe.native import kernels
from offload_moe.quant.layout import ExpertShape, Matrix, pack_planes
from tests.support.kernels import SETS, relative_error

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(("rows", "columns"), [(33, 128), (7, 70)])
def test_linear_matches_fp64(instruction_set: str, rows: int, columns: int) -> None:
    padded = -(-columns // 64) * 64
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 256, (rows, padded // 2), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(115, 131, (rows * padded // 32,), generator=generator, dtype=torch.uint8)
    layout = pack_planes(
        [("weight.codes", torch.uint8, (rows, padded // 2)), ("weight.scales", torch.uint8, (rows * padded // 32,))]
    )
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    layout.view(record, "weight.codes").copy_(codes)
    layout.view(record, "weight.scales").copy_(exponents)
    values = E2M1[torch.stack([codes & 15, codes >> 4], dim=-1).int()].view(-1, 32)
    weight = (values * torch.exp2(exponents.double() - 127)[:, None]).view(rows, padded)[:, :columns]

    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=rows, in_features=columns),))
    kernel = kernels.LinearKernel("mxfp4", [shape], [layout])
    kernels.select_instruction_set(instruction_set)
    try:
        for num_tokens in (1, 2, 3, 9):
            x = torch.randn(num_tokens, columns, generator=generator)
            out = torch.empty(num_tokens, rows)
            kernel.forward(x, [record], [out])
            assert relative_error(out, x.double() @ weight.T) < 1e-6
    finally:
        kernels.select_instruction_set(None)
