"""Reading piece by piece gives the bits that `from_pretrained` gives, whatever way a family stores its experts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.checkpoint.skeleton import auto_class
from tests.support.checkpoints import FAMILIES, FEW, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
REFUSED = ("diffusion_gemma",)  # see test_families_refused.py
REST = [family for family in FAMILIES if family not in (*FEW, *REFUSED)]


def expert_of_the_whole(state: dict[str, Tensor], layer: ExpertsModule, name: str, expert: int) -> Tensor:
    """The same tensor cut out of the whole layer's parameters."""
    pieces = []
    for part in layer.parts[name]:
        value = state[f"{layer.name}.{part.parameter.format(expert)}"]
        if part.is_stacked:
            value = value[expert]
        elif part.num_rows:
            value = value[expert * part.num_rows : (expert + 1) * part.num_rows]
        pieces.append(value.T if part.is_transposed else value)
    return torch.cat(pieces)


def assert_same_bits(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        reference = auto_class(checkpoint.model.config).from_pretrained(folder, dtype="auto")
        state = reference.state_dict()
        seen = set()
        for ordinal, layer in enumerate(checkpoint.layers):
            for expert in range(layer.num_experts):
                for name, value in checkpoint.expert(ordinal, expert).items():
                    expected = expert_of_the_whole(state, layer, name, expert)
                    assert torch.equal(value.to(expected.dtype), expected), (layer.name, expert, name)
            seen |= set(layer.parameter_names())
        for name, tensor in checkpoint.dense.items():
            value = checkpoint.dense_tensor(name)
            assert (value.dtype, tuple(value.shape)) == (tensor.dtype, tensor.shape)
            assert torch.equal(torch.cat([*checkpoint.dense_chunks(name, 1000)]), value.reshape(-1).view(torch.uint8))
            assert torch.equal(value.to(state[name].dtype), state[name]), name
            seen.add(name)
        assert set(state) - seen <= set(reference.all_tied_weights_keys)


@pytest.mark.parametrize("family", FEW)
def test_every_piece_has_the_bits_of_the_whole_model(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family)
    assert_same_bits(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", REST)
def test_every_other_family(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family)
    assert_same_bits(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype=dtype)
    assert_same_bits(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert {tensor.dtype for tensor in checkpoint.expert(0, 0).values()} == {dtype}


def test_a_single_file_without_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shard_size="1GB")
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert_same_bits(tmp_path)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    assert_same_bits(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert "lm_head.weight" not in checkpoint.dense


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe"])
def test_experts_apart_and_fused_are_the_same(family: str, tmp_path: Path) -> None:
    """The same weights under the names of the model itself, which transformers reads too."""
    model = write_checkpoint(tmp_path / "apart", family)
    write_checkpoint(tmp_path / "fused", family, shard_size="1GB")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    assert_same_bits(tmp_path / "fused")
    with Checkpoint(tmp_path / "apart") as apart, Checkpoint(tmp_path / "fused") as fused:
        assert any("experts.0." in name for name in apart.tensors.entries)
        assert not any("experts.0." in name for name in fused.tensors.entries)
        for ordinal, layer in enumerate(apart.layers):
            for expert in range(layer.num_experts):
                one, other = apart.expert(ordinal, expert), fused.expert(ordinal, expert)
                assert all(torch.equal(one[name], other[name]) for name in one)


def test_experts_stored_fused_and_transposed(tmp_path: Path) -> None:
    """qwen3_vl_moe keeps `[E, in, out]` on the hub and transposes where the full shape says so."""
    write_checkpoint(tmp_path, "qwen3_vl_moe", shard_size="1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if "experts" in name:
            assert tensor.shape[1] != tensor.shape[2]
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_bits(tmp_path)
