"""GGUF files become the stores of the models that they stand for; transformers reads the same numbers from them."""

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor, load_gguf_checkpoint

from offload_moe import load
from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError
from offload_moe.store import Store
from tests.support.checkpoints import tiny_config
from tests.support.gguf_files import ARCHITECTURES, OF_DELTA_RULES, sizes_of, write_gguf, write_mxfp4_gguf
from tests.support.quantized import edit_json, write_mxfp4_checkpoint
from tests.support.stores import assert_same_stores

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
Kind = gguf.GGMLQuantizationType


@pytest.mark.parametrize("codec", ["nf4", "bf16"])
@pytest.mark.parametrize("family", [family for family in ARCHITECTURES if family not in OF_DELTA_RULES])
def test_a_store_has_the_bytes_of_the_model_it_stands_for(family: str, codec: str, tmp_path: Path) -> None:
    source, plain = write_gguf(tmp_path, family)
    assert_same_stores(quantize(source, tmp_path / "a", codec=codec), quantize(plain, tmp_path / "b", codec=codec))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q5_1])
def test_types_of_tensors(kind: Kind, tmp_path: Path) -> None:
    source, plain = write_gguf(tmp_path, "mixtral", kind)
    assert_same_stores(quantize(source, tmp_path / "a"), quantize(plain, tmp_path / "b"))


@pytest.mark.parametrize("codec", ["mxfp4", "nf4"])
def test_mxfp4_in_gguf_keeps_its_bits(codec: str, tmp_path: Path) -> None:
    """Against the same bits as gpt-oss itself has them: blocks and scales in safetensors."""
    plain, _ = write_mxfp4_checkpoint(tmp_path)
    source = write_mxfp4_gguf(tmp_path / "gguf", plain)
    chosen = None if codec == "mxfp4" else codec
    store = quantize(source, tmp_path / "a", codec=chosen)
    assert_same_stores(store, quantize(plain, tmp_path / "b", codec=chosen))
    assert Store.open(store).codec == codec


def test_an_older_file_has_keys_and_values_of_the_latent_in_one(tmp_path: Path) -> None:
    source, plain = write_gguf(tmp_path, "deepseek_v3", Kind.F32, is_latent_split=False)
    assert_same_stores(quantize(source, tmp_path / "a"), quantize(plain, tmp_path / "b"))


def test_a_half_that_is_missing(tmp_path: Path) -> None:
    source, _ = write_gguf(tmp_path, "deepseek_v2", without="blk.1.attn_v_b.weight")
    refused(source, tmp_path, "attn_k_b.weight has no blk.1.attn_v_b.weight")


def test_a_model_in_several_files(tmp_path: Path) -> None:
    source, plain = write_gguf(tmp_path, "mixtral", tensors_per_file=9)
    assert len(list(source.glob("model-*-of-*.gguf"))) > 2
    assert_same_stores(quantize(source, tmp_path / "a"), quantize(plain, tmp_path / "b"))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_transformers_reads_the_same_numbers(family: str, tmp_path: Path) -> None:
    source, _ = write_gguf(tmp_path, family)
    with Checkpoint(source) as checkpoint:
        theirs = load_gguf_checkpoint(source / "model.gguf", return_tensors=True, model_to_load=checkpoint.model)
        tensors = theirs["tensors"]
        for ordinal, layer in enumerate(checkpoint.layers):
            for expert in range(layer.num_experts):
                for name, value in checkpoint.expert(ordinal, expert).items():
                    assert torch.equal(value, tensors[f"{layer.name}.{name}"][expert].to(value.dtype))
        for name in checkpoint.dense:
            value = checkpoint.dense_tensor(name)
            assert torch.equal(value, tensors[name].to(value.dtype).view(value.shape)), name


def test_queries_and_keys_are_turned_back_as_transformers_does(tmp_path: Path) -> None:
    source, _ = write_gguf(tmp_path, "mixtral", Kind.F32)
    config = tiny_config("mixtral", **sizes_of("mixtral"))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source / "model.gguf").tensors}
    processor = LlamaTensorProcessor(config=config.to_dict())
    with Checkpoint(source) as checkpoint:
        for ours, theirs in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
            name = f"blk.1.{theirs}.weight"
            expected = torch.from_numpy(processor.process(stored[name].data, name).weights.copy())
            assert torch.equal(checkpoint.dense_tensor(f"model.layers.1.self_attn.{ours}.weight"), expected)


def test_a_loaded_model_answers(tmp_path: Path) -> None:
    source, plain = write_gguf(tmp_path, "qwen3_moe")
    ids = torch.arange(1, 9)[None]
    stores = quantize(source, tmp_path / "a", codec="bf16"), quantize(plain, tmp_path / "b", codec="bf16")
    logits = []
    for store in stores:
        with load(store, dtype=torch.float32, exact=True) as model, torch.no_grad():
            logits.append(model.hf(ids).logits)
    assert torch.equal(*logits)
    assert logits[0].abs().sum() > 0


def test_chunks_are_the_bytes_of_the_whole(tmp_path: Path) -> None:
    with Checkpoint(write_gguf(tmp_path, "mixtral")[0]) as checkpoint:
        for name in checkpoint.dense:
            whole = checkpoint.dense_tensor(name).contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(torch.cat([*checkpoint.dense_chunks(name, 700)]), whole)


def refused(source: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        quantize(source, tmp_path / "store")


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    source, _ = write_gguf(tmp_path, "qwen3_moe", architecture="grok")
    refused(source, tmp_path, "architecture 'grok'; llama, .* can be read. Use a safetensors version")


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    source, _ = write_gguf(tmp_path, "qwen3_moe")
    shutil.copy(source / "model.gguf", source / "model-Q4.gguf")
    refused(source, tmp_path, "holds 2 models in GGUF")


def test_a_file_alone_needs_its_config(tmp_path: Path) -> None:
    source, _ = write_gguf(tmp_path, "qwen3_moe")
    refused(source / "model.gguf", tmp_path, "its metadata has no usable qwen3moe.block_count")
    (source / "config.json").unlink()
    refused(source, tmp_path, "it has no config.json")


@pytest.mark.parametrize("size", [0, 3, 30, 2000, -4000])
def test_a_file_cut_short(size: int, tmp_path: Path) -> None:
    source, _ = write_gguf(tmp_path, "qwen3_moe")
    content = (source / "model.gguf").read_bytes()
    (source / "model.gguf").write_bytes(content[:size])
    refused(source, tmp_path, r"model\.gguf.*(damaged|cut short)")


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    source, _ = write_gguf(tmp_path, "mixtral")
    edit_json(source / "config.json", num_attention_heads=5)
    refused(source, tmp_path, "has 64 rows, config.json says 5 heads")


def test_a_config_whose_part_about_the_language_model_is_null(tmp_path: Path) -> None:
    source, _ = write_gguf(tmp_path, "qwen3_moe")
    edit_json(source / "config.json", text_config=None)
    with Checkpoint(source) as checkpoint:
        assert checkpoint.dense_tensor("model.norm.weight").shape == (64,)
