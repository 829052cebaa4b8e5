"""Every quantized format of safetensors, one weight at a time, against a slow reference of the format."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offload_moe.checkpoint.formats import open_tensors, quantization_settings
from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.errors import CheckpointError

NAME = "model.layers.0.mlp.experts.1.up_proj."
ROWS, COLUMNS = 32, 96
FP8 = torch.float8_e4m3fn
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word


def opened(folder: Path, settings: dict[str, object] | None, tensors: dict[str, Tensor]) -> TensorSource:
    config = {"model_type": "qwen3_moe"} | ({"quantization_config": settings} if settings is not None else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return open_tensors(folder)


def check(stored: TensorSource, expected: Tensor, name: str = f"{NAME}weight") -> None:
    """The whole and a few rows; names of parts are gone."""
    assert expected.abs().sum() > 0
    assert list(stored.entries) == [name]
    assert stored.entries[name].dtype == expected.dtype
    assert stored.entries[name].shape == tuple(expected.shape)
    assert torch.equal(stored.read(name), expected)
    assert torch.equal(stored.read_rows(name, 3, 9), expected[3:9])
    assert torch.equal(torch.cat([*stored.chunks(name, 333)]), expected.reshape(-1).view(torch.uint8))


def pack(codes: Tensor, bits: int) -> Tensor:
    """int ``[R, C]`` -> int32 words: a row is one long number, its first code lowest."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(-(-len(row) * bits // 32) * 4, "little"), dtype="<i4").copy())
    return torch.from_numpy(np.stack(rows))


def random_codes(bits: int, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


def random_scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 0.1 + 0.01).to(dtype)


def dequantized(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """Every weight looks up its own group."""
    exact = (codes - zeros[:, groups]).numpy().astype(np.float64) * scales[:, groups].double().numpy()
    return torch.from_numpy(exact).float().to(scales.dtype)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["reordered", "named", "unnamed"])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, num_groups: int, order: str, layout: str) -> None:
    codes, zeros = random_codes(bits), random_codes(bits, ROWS, num_groups, seed=1)
    scales, groups = random_scales(ROWS, num_groups), torch.arange(COLUMNS) // (COLUMNS // num_groups)
    if order == "reordered":
        groups = groups[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))]
    less = 1 if layout == "gptq" else 0
    parts = {
        f"{NAME}qweight": pack(codes, bits).T,
        f"{NAME}qzeros": pack((zeros.T - less) % (1 << bits), bits),
        f"{NAME}scales": scales.T,
    }
    if order != "unnamed":
        parts[f"{NAME}g_idx"] = groups.int()
    # The settings' own bits are those of most layers, not of all.
    settings = {"quant_method": "gptq", "bits": 4, "desc_act": order == "reordered", "checkpoint_format": layout}
    check(opened(tmp_path, settings, parts), dequantized(codes, zeros, scales, groups))


def awq_parts(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    def interleaved(values: Tensor) -> Tensor:
        return pack(values.T.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4)

    return {f"{NAME}qweight": interleaved(codes), f"{NAME}qzeros": interleaved(zeros), f"{NAME}scales": scales.T}


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "bits": 4, "version": "gemm"},
        {"quant_method": "AWQ", "w_bit": 4, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "checkpoint_format": "gemm"},
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"},
    ],
)
def test_awq(tmp_path: Path, settings: dict[str, object], num_groups: int) -> None:
    codes, zeros = random_codes(4), random_codes(4, ROWS, num_groups, seed=1)
    scales, groups = random_scales(ROWS, num_groups), torch.arange(COLUMNS) // (COLUMNS // num_groups)
    stored = opened(tmp_path, settings, awq_parts(codes, zeros, scales))
    check(stored, dequantized(codes, zeros, scales, groups))


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
@pytest.mark.parametrize(
    ("layout", "less"),
    [("auto_round:auto_gptq", 1), ("auto_round:gptq", 1), (None, 1), ("auto_round", 0), ("auto_round:gptqmodel", 0)],
)
def test_auto_round(tmp_path: Path, method: str, layout: str | None, less: int) -> None:
    """As one of GPTQ's versions, with bits that its `extra_config` has layer by layer."""
    codes, zeros, scales = random_codes(8), random_codes(8, ROWS, 1, seed=1), random_scales(ROWS, 1)
    parts = {
        f"{NAME}qweight": pack(codes, 8).T,
        f"{NAME}qzeros": pack((zeros.T - less) % 256, 8),
        f"{NAME}scales": scales.T,
    }
    settings = {"quant_method": method, "bits": 4, "packing_format": layout, "extra_config": {"x": {"bits": 8}}}
    groups = torch.zeros(COLUMNS, dtype=torch.int64)
    check(opened(tmp_path, settings, parts), dequantized(codes, zeros, scales, groups))


@pytest.mark.parametrize(
    ("name", "content", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, "gptq"),
        ("quantize_config.json", {"bits": 4, "quant_method": "awq", "version": "gemm"}, "awq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, "awq"),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "FP8"}}, "modelopt"),
    ],
)
def test_settings_in_a_file_of_their_own(tmp_path: Path, name: str, content: dict[str, object], method: str) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    codes, zeros, scales = random_codes(4), random_codes(4, ROWS, 3, seed=1), random_scales(ROWS, 3)
    expected = dequantized(codes, zeros, scales, torch.arange(COLUMNS) // 32)
    gptq = {
        f"{NAME}qweight": pack(codes, 4).T,
        f"{NAME}qzeros": pack((zeros.T - 1) % 16, 4),
        f"{NAME}scales": scales.T,
    }
    fp8 = {f"{NAME}weight": torch.ones(ROWS, COLUMNS).to(FP8), f"{NAME}weight_scale": torch.tensor(0.25)}
    parts = {"gptq": gptq, "awq": awq_parts(codes, zeros, scales), "modelopt": fp8}[method]
    stored = opened(tmp_path, None, parts)
    check(stored, torch.full((ROWS, COLUMNS), 0.25, dtype=torch.bfloat16) if method == "modelopt" else expected)
    settings = quantization_settings(tmp_path)
    assert settings is not None
    assert settings["quant_method"] == method


def test_settings_of_the_config_come_first(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 2, "checkpoint_format": "marlin"}))
    codes, zeros, scales = random_codes(4), random_codes(4, ROWS, 3, seed=1), random_scales(ROWS, 3)
    stored = opened(tmp_path, {"quant_method": "awq", "bits": 4}, awq_parts(codes, zeros, scales))
    check(stored, dequantized(codes, zeros, scales, torch.arange(COLUMNS) // 32))


@pytest.mark.parametrize("content", ["[]", "{", '"x"'])
def test_a_file_of_settings_that_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "quantize_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"quantize_config\.json .*Download it again"):
        opened(tmp_path, None, {f"{NAME}weight": torch.ones(2, 2)})


def test_a_model_that_is_no_longer_quantized(tmp_path: Path) -> None:
    """The settings of GPTQ were left behind in the folder."""
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    check(opened(tmp_path, None, {f"{NAME}weight": random_scales(16, 8)}), random_scales(16, 8))


@pytest.mark.parametrize(
    ("part", "value", "kind"),
    [
        ("qweight", torch.ones(4, 4, dtype=torch.int32), "GPTQ or AWQ"),
        ("weight_packed", torch.ones(4, 4, dtype=torch.int32), "compressed-tensors"),
        ("weight", torch.ones(4, 4).to(FP8), "FP8"),
        ("SCB", torch.ones(4), "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", torch.ones(4, dtype=torch.uint8), "bitsandbytes"),
        ("q_weight", torch.ones(4, 4, dtype=torch.int32), "EXL2"),
    ],
)
def test_nothing_says_how_a_weight_is_quantized(tmp_path: Path, part: str, value: Tensor, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{part} is quantized \({kind}\), but neither config\.json nor"):
        opened(tmp_path, None, {f"{NAME}{part}": value})


def compressed(layout: str | None, targets: list[str] | None = None, **weights: object) -> dict[str, object]:
    groups = {"group_0": {"targets": targets or ["Linear"], "weights": {"type": "int"} | weights}}
    settings = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}
    return settings | ({"format": layout} if layout else {})


@pytest.mark.parametrize("zeros_are", ["none", "packed", "int8"])
@pytest.mark.parametrize("order", ["none", "reordered", "never set"])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_packed(tmp_path: Path, bits: int, num_groups: int, order: str, zeros_are: str) -> None:
    middle = 1 << (bits - 1)
    codes, zeros = random_codes(bits), random_codes(bits, ROWS, num_groups, seed=1)
    scales = random_scales(ROWS, num_groups, dtype=torch.bfloat16)
    groups = torch.arange(COLUMNS) // (COLUMNS // num_groups)
    parts = {
        f"{NAME}weight_packed": pack(codes, bits),
        f"{NAME}weight_scale": scales,
        f"{NAME}weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    if zeros_are == "none":
        zeros = torch.full_like(zeros, middle)
    elif zeros_are == "packed":
        parts[f"{NAME}weight_zero_point"] = pack(zeros.T, bits).T
    else:
        parts[f"{NAME}weight_zero_point"] = (zeros - middle).to(torch.int8)
    if order == "reordered":
        groups = groups[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))]
        parts[f"{NAME}weight_g_idx"] = groups.int()
    elif order == "never set":
        parts[f"{NAME}weight_g_idx"] = torch.full((COLUMNS,), -1, dtype=torch.int32)
    settings = compressed("pack-quantized", num_bits=bits, symmetric=zeros_are == "none")
    check(opened(tmp_path, settings, parts), dequantized(codes, zeros, scales, groups))


@pytest.mark.parametrize(
    ("targets", "bits"),
    [
        ([NAME.removesuffix(".")], 8),
        ([r"re:.*experts\.\d+\.up_proj$"], 8),
        ([r"re:.*self_attn.*"], 4),
        (["model.layers.0.mlp.experts.0.up_proj"], 4),
    ],
)
def test_compressed_bits_are_those_of_the_group_that_names_the_module(
    tmp_path: Path, targets: list[str], bits: int
) -> None:
    codes = random_codes(bits)
    scales = random_scales(ROWS, 1, dtype=torch.bfloat16)
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 4}},
        "b": {"targets": targets, "weights": {"num_bits": 8}},
    }
    parts = {
        f"{NAME}weight_packed": pack(codes, bits),
        f"{NAME}weight_scale": scales,
        f"{NAME}weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    stored = opened(tmp_path, compressed("pack-quantized") | {"config_groups": groups}, parts)
    zeros = torch.full((ROWS, 1), 1 << (bits - 1))
    check(stored, dequantized(codes, zeros, scales, torch.zeros(COLUMNS, dtype=torch.int64)))


@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized", None])
@pytest.mark.parametrize("shape", [(), (1,), (ROWS, 1), (ROWS, 3)])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_compressed_int8(tmp_path: Path, shape: tuple[int, ...], layout: str | None, has_zeros: bool) -> None:
    codes = random_codes(8) - 128
    scales = random_scales(*shape, dtype=torch.float32)
    parts = {f"{NAME}weight": codes.to(torch.int8), f"{NAME}weight_scale": scales}
    zeros = torch.zeros(shape)
    if has_zeros:
        zeros = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(5))
        parts[f"{NAME}weight_zero_point"] = zeros.to(torch.int8)
    num_groups = shape[1] if len(shape) > 1 else 1
    every = (ROWS, num_groups)
    expected = dequantized(
        codes,
        zeros.reshape(-1, num_groups).expand(every),
        scales.reshape(-1, num_groups).expand(every),
        torch.arange(COLUMNS) // (COLUMNS // num_groups),
    )
    check(opened(tmp_path, compressed(layout, num_bits=8), parts), expected)


def random_fp8(*shape: int, dtype: torch.dtype = FP8) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)


def scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """scales: as large as the codes."""
    return (codes.double() * scales.double()).float().to(torch.bfloat16)


METHODS = (
    {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    compressed("naive-quantized", num_bits=8, type="float", strategy="channel"),
)


@pytest.mark.parametrize("settings", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (ROWS,), (ROWS, 1)])
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_fp8_with_one_scale_per_weight_or_row(
    tmp_path: Path, settings: dict[str, object], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    codes, scales = random_fp8(ROWS, COLUMNS, dtype=dtype), random_scales(*shape, dtype=torch.float32)
    stored = opened(tmp_path, settings, {f"{NAME}weight": codes, f"{NAME}weight_scale": scales})
    check(stored, scaled(codes, scales.reshape(-1, 1).expand(ROWS, COLUMNS)))


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_in_blocks(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    codes, scales = random_fp8(ROWS, COLUMNS), random_scales(2, 3, dtype=torch.float32).to(dtype)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 40]}
    stored = opened(tmp_path, settings, {f"{NAME}weight": codes, f"{NAME}{name}": scales})
    every = scales.double().repeat_interleave(16, 0).repeat_interleave(40, 1)[:, :COLUMNS]
    check(stored, scaled(codes, every))


@pytest.mark.parametrize("shape", [(160, 192), (64, 300), (129, 128)])
def test_fp8_in_the_usual_blocks_where_the_config_names_none(tmp_path: Path, shape: tuple[int, int]) -> None:
    rows, columns = shape
    codes, scales = random_fp8(rows, columns), random_scales(-(-rows // 128), -(-columns // 128), dtype=torch.float32)
    stored = opened(tmp_path, {"quant_method": "fp8"}, {f"{NAME}weight": codes, f"{NAME}weight_scale_inv": scales})
    every = scales.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    check(stored, scaled(codes, every))


@pytest.mark.parametrize("locations", [[], ["weight_input"], ["weight_output", "weight_input"]])
def test_compressed_transforms_of_weights_are_in_the_weights(tmp_path: Path, locations: list[str]) -> None:
    codes, scales = random_fp8(ROWS, COLUMNS), random_scales(ROWS, 1, dtype=torch.float32)
    settings = compressed("float-quantized", num_bits=8) | {"transform_config": transforms(locations)}
    stored = opened(tmp_path, settings, {f"{NAME}weight": codes, f"{NAME}weight_scale": scales})
    check(stored, scaled(codes, scales.expand(ROWS, COLUMNS)))


@pytest.mark.parametrize(
    ("config", "places"),
    [
        (["weight_input", "input"], "input"),
        (["q_attn", "k_cache"], "k_cache, q_attn"),
        ({"config_groups": {"R1": {"type": "hadamard"}}}, "unknown"),
        ([["input"]], "unknown"),
    ],
)
def test_compressed_transforms_of_activations_are_refused(tmp_path: Path, config: object, places: str) -> None:
    config = transforms(config) if isinstance(config, list) else config
    parts = {f"{NAME}weight": random_fp8(ROWS, COLUMNS), f"{NAME}weight_scale": torch.ones(ROWS, 1)}
    with pytest.raises(CheckpointError, match=rf"transform_config: {places}\), .* Use a version"):
        opened(tmp_path, compressed("float-quantized", num_bits=8) | {"transform_config": config}, parts)


def transforms(locations: list[object]) -> dict[str, object]:
    return {"config_groups": {"R1": {"type": "hadamard", "apply": [{"location": place} for place in locations]}}}


@pytest.mark.parametrize(
    ("weights", "shape", "block"),
    [
        ({"strategy": "block", "block_structure": [16, 32]}, (2, 3), (16, 32)),
        ({"strategy": "group", "group_size": 48}, (ROWS, 2), (1, 48)),
    ],
)
def test_compressed_fp8_in_blocks_and_groups(
    tmp_path: Path, weights: dict[str, object], shape: tuple[int, int], block: tuple[int, int]
) -> None:
    codes, scales = random_fp8(ROWS, COLUMNS), random_scales(*shape, dtype=torch.bfloat16)
    settings = compressed("float-quantized", num_bits=8, type="float", **weights)
    stored = opened(tmp_path, settings, {f"{NAME}weight": codes, f"{NAME}weight_scale": scales})
    check(stored, scaled(codes, scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)))


@pytest.mark.parametrize(
    "settings",
    [
        compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32),
        {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    ],
)
def test_mxfp8(tmp_path: Path, settings: dict[str, object]) -> None:
    """Scales are exponents in bytes."""
    codes = random_fp8(ROWS, COLUMNS)
    exponents = torch.randint(118, 130, (ROWS, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    stored = opened(tmp_path, settings, {f"{NAME}weight": codes, f"{NAME}weight_scale": exponents})
    check(stored, scaled(codes, torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)))


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.mark.parametrize(
    ("settings", "codes_name", "scales_name", "dtypes"),
    [
        (compressed("mxfp4-pack-quantized"), "weight_packed", "weight_scale", (torch.uint8, torch.uint8)),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "weight",
            "scale",
            (torch.int8, torch.float8_e8m0fnu),
        ),
    ],
)
def test_mxfp4_of_one_matrix(
    tmp_path: Path, settings: dict[str, object], codes_name: str, scales_name: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    codes = random_codes(4)
    pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    exponents = torch.randint(118, 130, (ROWS, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    parts = {f"{NAME}{codes_name}": pairs.view(dtypes[0]), f"{NAME}{scales_name}": exponents.view(dtypes[1])}
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)], dtype=torch.float64)
    every = torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)
    check(opened(tmp_path, settings, parts), scaled(levels[codes], every))


FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("shape", "suffix", "method"),
    [
        ((), "_scale", "fp8"),
        ((1,), "_weight_scale", "modelopt"),
        ((4,), "_scale", "fp8"),
        ((4, 1), "_scale_inv", "fp8"),
        ((4, 1, 1), "_scale_inv", "fp8"),
        ((4, 16, 1), "_scale", "fp8"),
        ((4, 16), "_scale", "fp8"),
        ((4, 1, 24), "_scale", "fp8"),
        ((4, 1, 24), "_scale", "fbgemm_fp8"),
    ],
)
def test_fp8_of_fused_experts(tmp_path: Path, shape: tuple[int, ...], suffix: str, method: str) -> None:
    codes, scales = random_fp8(4, 16, 24), random_scales(*shape, dtype=torch.float32)
    stored = opened(tmp_path, {"quant_method": method, "quant_algo": "FP8"}, {FUSED: codes, FUSED + suffix: scales})
    every = scales.reshape(*shape, *(1,) * (3 - len(shape))) if len(shape) > 1 else scales.reshape(-1, 1, 1)
    expected = scaled(codes, every.expand(4, 16, 24))
    assert torch.equal(stored.read(FUSED), expected)
    for expert in range(4):
        assert torch.equal(stored.read_rows(FUSED, expert, expert + 1)[0], expected[expert])
    assert expected.abs().sum() > 0


def test_fbgemm_keeps_scales_of_outputs_where_inputs_are_as_many(tmp_path: Path) -> None:
    """Fused experts are [in, out]; scales ``[E, out, 1]`` look like scales of rows."""
    codes, scales = random_fp8(4, 16, 16), random_scales(4, 16, 1, dtype=torch.float32)
    stored = opened(tmp_path, {"quant_method": "fbgemm_fp8"}, {FUSED: codes, f"{FUSED}_scale": scales})
    expected = scaled(codes, scales.reshape(4, 1, 16).expand(4, 16, 16))
    assert torch.equal(stored.read(FUSED), expected)


@pytest.mark.parametrize(
    ("settings", "parts", "match"),
    [
        (
            compressed("mixed-precision"),
            {"weight_packed": torch.ones(4, 8, dtype=torch.uint8), "weight_global_scale": torch.ones(1)},
            r"weight_global_scale belongs to a weight in NVFP4 .* Use a version",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {"weight": torch.ones(4, 8, dtype=torch.uint8), "weight_scale_2": torch.tensor(1.0)},
            r"ModelOpt \(NVFP4\): tensor .*weight_scale_2 belongs to NVFP4, .* Use a version",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
            {"weight": torch.ones(4, 8, dtype=torch.uint8), "weight_scale": torch.ones(4, 1)},
            r"up_proj\.weight is torch.uint8 \[4, 8\], which can be read as MXFP4 .* Use a version",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            {"weight": torch.ones(4, 8, dtype=torch.uint8)},
            r"ModelOpt \(W4A8_AWQ\), of which FP8 can be read. Use a version",
        ),
        (
            compressed("int-quantized", num_bits=8),
            {"weight": torch.ones(4, 8, dtype=torch.int8)},
            r"up_proj\.weight is int8, but .*weight_scale is missing\. Download",
        ),
        (
            compressed("int-quantized", num_bits=8),
            {"weight": torch.ones(4, 8, dtype=torch.int8), "weight_scale": torch.ones(3, 1)},
            r"weight_scale is torch.float32 \[3, 1\], which does not fit the int8 weight .*Download",
        ),
        (
            compressed("float-quantized", num_bits=8),
            {"weight": torch.ones(4, 8).to(FP8), "weight_scale": torch.ones(8)},
            r"weight_scale is torch.float32 \[8\], expected one scale for the FP8 weight \[4, 8\] or for each .*Use",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [2, 2]},
            {"weight": torch.ones(4, 8).to(FP8), "weight_scale": torch.ones(4, 1)},
            r"weight_scale is torch.float32 \[4, 1\], expected one scale per block of \[2, 2\]: \[2, 4\]\. Use",
        ),
        (
            compressed("pack-quantized", ["re:("], num_bits=4),
            {"weight_packed": torch.ones(4, 8, dtype=torch.int32)},
            r"target 're:\(' is no pattern",
        ),
        (
            {"quant_method": "gptq", "bits": 5},
            {
                "qweight": torch.ones(5, 32, dtype=torch.int32),
                "qzeros": torch.ones(1, 5, dtype=torch.int32),
                "scales": torch.ones(1, 32),
            },
            r"up_proj\.qweight is GPTQ with 5 bits; 2, 3, 4, 8 can be read\. Use a version",
        ),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, settings: dict[str, object], parts: dict[str, Tensor], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        opened(tmp_path, settings, {NAME + part: value for part, value in parts.items()})


def test_bits_that_the_shape_contradicts(tmp_path: Path) -> None:
    """The config says 8 bits; half as many weights would come of it."""
    parts = {
        f"{NAME}weight_packed": pack(random_codes(4), 4),
        f"{NAME}weight_scale": random_scales(ROWS, 1, dtype=torch.bfloat16),
        f"{NAME}weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    stored = opened(tmp_path, compressed("pack-quantized", num_bits=8), parts)
    with pytest.raises(CheckpointError, match=r"weight_shape is not .* the weight is not in 8 bits"):
        stored.read(f"{NAME}weight")
