"""GGUF files as others write them: types that differ, an expert per tensor, parts, and the other byte order."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError
from offload_moe.store import Store
from tests.support.gguf_files import write_gguf
from tests.support.quantized import edit_json
from tests.support.stores import assert_same_stores

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
Kind = gguf.GGMLQuantizationType
Tensors = dict[str, tuple[Tensor, gguf.GGMLQuantizationType]]
EXPERTS = "model.layers.{}.mlp.experts."


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE in F32."""
    return write_gguf(tmp_path_factory.mktemp("gguf"), "qwen3_moe", Kind.F32)[0]


def rewrite(
    original: Path,
    folder: Path,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    *,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    per_file: int = 0,
) -> Path:
    """The same model with other types and names, in a folder of its own."""
    folder.mkdir()
    shutil.copy(original / "config.json", folder)
    reader = gguf.GGUFReader(original / "model.gguf")
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture, endianess=endian, split_max_tensors=per_file)
    for name, (value, kind) in change(
        {tensor.name: (torch.from_numpy(tensor.data.copy()), Kind.F32) for tensor in reader.tensors}
    ).items():
        writer.add_tensor(name, gguf.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def as_kinds(**kinds: gguf.GGMLQuantizationType) -> Callable[[Tensors], Tensors]:
    """Types by a part of the name, such as `ffn_up_exps`."""

    def change(tensors: Tensors) -> Tensors:
        for name, (value, _) in tensors.items():
            for part, kind in kinds.items():
                if part in name and value.dim() > 1:
                    tensors[name] = (value, kind)
        return tensors

    return change


def rounded(value: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    """What a tensor stands for, in the dtype in which it is read."""
    kept = {Kind.F32: torch.float32, Kind.F16: torch.float16}.get(kind, torch.bfloat16)
    return torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind).astype(np.float32)).to(kept)


@pytest.mark.parametrize(
    ("gate", "up", "down", "joined"),
    [
        (Kind.Q8_0, Kind.Q5_1, Kind.Q4_0, torch.bfloat16),
        (Kind.Q4_1, Kind.Q5_0, Kind.F16, torch.bfloat16),
        (Kind.F32, Kind.Q8_0, Kind.F32, torch.float32),
        (Kind.BF16, Kind.F16, Kind.Q8_0, torch.float32),
    ],
)
def test_gate_up_and_down_of_different_types(
    original: Path,
    tmp_path: Path,
    gate: gguf.GGMLQuantizationType,
    up: gguf.GGMLQuantizationType,
    down: gguf.GGMLQuantizationType,
    joined: torch.dtype,
) -> None:
    kinds = {"blk.0.ffn_gate_exps": gate, "blk.0.ffn_up_exps": up, "blk.0.ffn_down_exps": down, "blk.1": Kind.Q8_0}
    folder = rewrite(original, tmp_path / "mixed", as_kinds(**(kinds | {"gate_inp": Kind.F32})))
    with Checkpoint(original) as plain, Checkpoint(folder) as mixed:
        for expert in range(mixed.layers[0].num_experts):
            exact, found = plain.expert(0, expert), mixed.expert(0, expert)
            halves = exact["gate_up_proj"].chunk(2)
            parts = [rounded(half, kind) for half, kind in zip(halves, (gate, up), strict=True)]
            assert found["gate_up_proj"].dtype == joined
            assert torch.equal(found["gate_up_proj"], torch.cat([part.to(joined) for part in parts]))
            assert torch.equal(found["down_proj"], rounded(exact["down_proj"], down))
            assert found["gate_up_proj"].abs().sum() > 0
    quantize(folder, tmp_path / "store")


def one_by_one(tensors: Tensors) -> Tensors:
    """Every expert in a tensor of its own, as before April 2024."""
    apart: Tensors = {}
    for name, (value, kind) in tensors.items():
        if "_exps." in name:
            apart |= {name.replace("_exps.", f".{number}."): (expert, kind) for number, expert in enumerate(value)}
        else:
            apart[name] = (value, kind)
    return apart


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
@pytest.mark.parametrize("per_file", [0, 5])
def test_one_tensor_per_expert(original: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType, per_file: int) -> None:
    together = rewrite(original, tmp_path / "together", as_kinds(_exps=kind))
    apart = rewrite(original, tmp_path / "apart", lambda t: one_by_one(as_kinds(_exps=kind)(t)), per_file=per_file)
    assert_same_stores(quantize(apart, tmp_path / "a"), quantize(together, tmp_path / "b"))


def test_one_tensor_per_expert_of_mixtral(tmp_path: Path) -> None:
    """The model that such files are of; its queries and keys are turned."""
    _, plain = write_gguf(tmp_path, "mixtral")
    apart = tmp_path / "apart"
    rewrite(write_gguf(tmp_path / "exact", "mixtral", Kind.F32)[0], apart, lambda t: one_by_one(all_q8_0(t)))
    assert_same_stores(quantize(apart, tmp_path / "a"), quantize(plain, tmp_path / "b"))


def all_q8_0(tensors: Tensors) -> Tensors:
    return {
        name: (value, Kind.F32 if value.dim() == 1 or "gate_inp" in name else Kind.Q8_0)
        for name, (value, _) in tensors.items()
    }


def test_experts_of_several_types(original: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        apart = one_by_one(tensors)
        name = "blk.1.ffn_down.2.weight"
        return apart | {name: (apart[name][0], Kind.Q4_0)}

    folder = rewrite(original, tmp_path / "several", change)
    with Checkpoint(original) as plain, Checkpoint(folder) as found:
        exact = plain.expert(1, 2)["down_proj"]
        assert torch.equal(found.expert(1, 2)["down_proj"], rounded(exact, Kind.Q4_0).float())
        assert not torch.equal(found.expert(1, 2)["down_proj"], exact)
        assert torch.equal(found.expert(1, 1)["down_proj"], plain.expert(1, 1)["down_proj"])


def refused(source: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        quantize(source, tmp_path / "store")


def test_an_expert_that_is_missing_or_of_another_shape(original: Path, tmp_path: Path) -> None:
    def without(tensors: Tensors) -> Tensors:
        return {name: value for name, value in one_by_one(tensors).items() if name != "blk.1.ffn_up.1.weight"}

    refused(rewrite(original, tmp_path / "a", without), tmp_path, r"blk\.1\.ffn_up\.1\.weight is missing.*Download")

    def narrower(tensors: Tensors) -> Tensors:
        apart = one_by_one(tensors)
        name = "blk.0.ffn_gate.3.weight"
        return apart | {name: (apart[name][0][:-1].contiguous(), Kind.F32)}

    refused(rewrite(original, tmp_path / "b", narrower), tmp_path, r"blk\.0\.ffn_gate\.3\.weight is \[31, .*Download")


@pytest.mark.parametrize("half", ["gate", "up"])
def test_a_half_of_the_experts_that_is_missing(original: Path, tmp_path: Path, half: str) -> None:
    def without(tensors: Tensors) -> Tensors:
        return {name: value for name, value in tensors.items() if name != f"blk.1.ffn_{half}_exps.weight"}

    refused(rewrite(original, tmp_path / "a", without), tmp_path, rf"has no blk\.1\.ffn_{half}_exps\.weight beside it")


def test_gate_and_up_in_one_tensor(original: Path, tmp_path: Path) -> None:
    def fused(tensors: Tensors) -> Tensors:
        for layer in ("blk.0.", "blk.1."):
            gate, up = (tensors.pop(f"{layer}ffn_{half}_exps.weight")[0] for half in ("gate", "up"))
            tensors[f"{layer}ffn_gate_up_exps.weight"] = (torch.cat([gate, up], dim=1), Kind.F32)
        return tensors

    folder = rewrite(original, tmp_path / "fused", fused)
    assert_same_stores(quantize(folder, tmp_path / "a"), quantize(original, tmp_path / "b"))


@pytest.mark.parametrize("missing", [[0], [1], [3], [0, 2], [1, 2, 3]])
def test_parts_that_are_missing_are_named(original: Path, tmp_path: Path, missing: list[int]) -> None:
    folder = rewrite(original, tmp_path / "parts", per_file=10)
    parts = sorted(folder.glob("*.gguf"))
    assert len(parts) == 4
    for number in missing:
        parts[number].unlink()
    names = ", ".join(f"model-0000{number + 1}-of-00004.gguf" for number in missing)
    refused(folder, tmp_path, rf"of the 4 parts of this GGUF file {len(missing)} are missing: {names}\. Download")


def test_a_part_under_another_name(original: Path, tmp_path: Path) -> None:
    """Only the file itself says that there are others."""
    folder = rewrite(original, tmp_path / "parts", per_file=10)
    first, *others = sorted(folder.glob("*.gguf"))
    for path in others:
        path.unlink()
    first.rename(folder / "mine.gguf")
    refused(folder, tmp_path, r"mine\.gguf is one part of a GGUF file in 4, of which 1 are there")


def test_parts_of_two_splits(original: Path, tmp_path: Path) -> None:
    folder = rewrite(original, tmp_path / "parts", per_file=10)
    shutil.copy(folder / "model-00001-of-00004.gguf", folder / "model-00001-of-00002.gguf")
    refused(folder, tmp_path, "holds 2 models in GGUF")


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.MXFP4])
@pytest.mark.parametrize("per_file", [0, 8])
def test_a_big_endian_file(original: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType, per_file: int) -> None:
    change = as_kinds(_exps=kind) if kind == Kind.MXFP4 else as_kinds(blk=kind)
    big = rewrite(original, tmp_path / "big", change, endian=gguf.GGUFEndian.BIG, per_file=per_file)
    little = rewrite(original, tmp_path / "little", change)
    assert_same_stores(quantize(big, tmp_path / "a", codec="bf16"), quantize(little, tmp_path / "b", codec="bf16"))
    assert Store.open(tmp_path / "a").read_dense("model.embed_tokens.weight").abs().sum() > 0


def test_a_big_endian_file_alone(original: Path, tmp_path: Path) -> None:
    """Its bytes would be taken as they lie."""
    big = rewrite(original, tmp_path / "big", endian=gguf.GGUFEndian.BIG)
    refused(big / "model.gguf", tmp_path, "is a big-endian GGUF file, which is not used as it lies")


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.Q8_0, Kind.Q4_0])
def test_big_endian_types_that_are_refused(original: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Programs disagree about their bytes, and a file does not say which wrote it."""
    big = rewrite(original, tmp_path / "big", as_kinds(ffn_up_exps=kind), endian=gguf.GGUFEndian.BIG)
    refused(big, tmp_path, rf"big-endian GGUF file.*ffn_up_exps\.weight is {kind.name}.*little-endian file")


@pytest.mark.parametrize("is_mxfp4", [True, False])
def test_a_config_that_says_mxfp4_does_not_choose_the_codec_of_other_types(tmp_path: Path, is_mxfp4: bool) -> None:
    """gpt-oss' config speaks of the original weights, whatever type the file beside it has."""
    source, plain = write_gguf(tmp_path, "gpt_oss")
    if is_mxfp4:
        edit_json(source / "config.json", quantization_config={"quant_method": "mxfp4"})
    assert_same_stores(quantize(source, tmp_path / "a"), quantize(plain, tmp_path / "b"))
    assert Store.open(tmp_path / "a").codec == "nf4"


def test_keys_and_values_of_the_latent_of_two_types(tmp_path: Path) -> None:
    original, _ = write_gguf(tmp_path, "deepseek_v3", Kind.F32)
    folder = rewrite(original, tmp_path / "mixed", as_kinds(attn_v_b=Kind.Q8_0))
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    with Checkpoint(original) as plain, Checkpoint(folder) as mixed:
        config = mixed.model.config
        sizes = [config.qk_nope_head_dim, config.v_head_dim]
        heads = plain.dense_tensor(name).unflatten(0, (config.num_attention_heads, -1))
        keys, values = heads.split(sizes, dim=1)
        values = rounded(values.contiguous(), Kind.Q8_0).float()
        expected = torch.cat([keys, values], dim=1).flatten(0, 1)
        assert torch.equal(mixed.dense_tensor(name), expected)
        assert not torch.equal(expected, plain.dense_tensor(name))


def test_experts_of_gpt_oss_of_which_some_are_mxfp4(tmp_path: Path) -> None:
    """Halves of two types are read as numbers, and so is the other matrix beside them."""
    original, _ = write_gguf(tmp_path, "gpt_oss", Kind.F32)
    kinds = as_kinds(ffn_gate_exps=Kind.MXFP4, ffn_up_exps=Kind.Q8_0, ffn_down_exps=Kind.MXFP4)
    folder = rewrite(original, tmp_path / "mixed", kinds)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    with Checkpoint(original) as plain, Checkpoint(folder) as mixed:
        assert not mixed.is_mxfp4
        exact, found = plain.expert(0, 1), mixed.expert(0, 1)
        gate, up = (exact["gate_up_proj"][:, half::2].T.contiguous() for half in (0, 1))
        parts = [rounded(gate, Kind.MXFP4), rounded(up, Kind.Q8_0)]
        assert torch.equal(found["gate_up_proj"], torch.stack(parts, dim=1).flatten(0, 1).T)
        down = exact["down_proj"].T.contiguous()
        assert torch.equal(found["down_proj"], rounded(down, Kind.MXFP4).T)
    assert Store.open(quantize(folder, tmp_path / "store")).codec == "nf4"
