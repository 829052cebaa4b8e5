"""llama.cpp on the very same GGUF files, where its wheel `xllamacpp` is installed: the next token of both."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from offload_moe import load
from offload_moe.checkpoint.gguf_file import read_gguf
from offload_moe.checkpoint.gguf_splits import SAME, SPLITS
from offload_moe.checkpoint.gguf_tokenizer import write_tokenizer
from tests.support.gguf_models import SETTINGS, VOCABULARY, write_model
from tests.support.gguf_vocabulary import TEXT, metadata_of

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # upstream's, of models outside their usual sizes
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs xllamacpp"),
]
IDS = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 7]
PROMPTS = [IDS, IDS[:5], IDS[::-1], IDS[4:], IDS[::2]]
# Both round activations to int8, each in its own way. Where all experts are used, that is all that differs. Routers of
# random weights have near ties: where a token goes to another expert, everything behind it differs.
FAR, FAR_WITH_TIES, LEAST_WITH_TIES = 0.06, 0.08, 2
# As measured: 0.01 to 0.06 without a latent, whose attention makes more of the rounding; 0.24 behind 27 layers.
FURTHER = {"lfm2_moe": 0.08, "deepseek_v2": 0.3} | dict.fromkeys(
    ("deepseek_v3", "glm4_moe_lite", "unsplit latent"), 0.22
)
ALL_EXPERTS = dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 4) | {"n_group": 1, "topk_group": 1}
CHOSEN = ("mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "lfm2_moe")
# In a process of its own, since llama.cpp ends it where it fails. A token that ends within a character gives no
# probabilities, so another one is drawn, of a flatter distribution; the probabilities are those of the logits.
SCRIPT = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx, params.warmup, params.cpuparams.n_threads = 1, 512, False, 1
server = xllamacpp.Server(params)
settings = {"max_tokens": 1, "logprobs": int(sys.argv[3]), "cache_prompt": False, "samplers": ["temperature"]}
results = []
for ids in json.loads(sys.argv[2]):
    for seed in range(50):
        answer = server.handle_completions(settings | {"prompt": ids, "seed": seed, "temperature": 1.0 + seed})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if found := answer["choices"][0]["logprobs"]:
            break
    results.append({token["id"]: token["logprob"] for token in found["content"][0]["top_logprobs"]})
print(json.dumps(results))
"""
TOKENIZE = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx, params.warmup, params.cpuparams.n_threads = 1, 512, False, 1
server = xllamacpp.Server(params)
body = json.dumps({"content": sys.argv[2], "add_special": False}).encode()
request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(request).read().decode())
"""
MERGED_VOCABULARY = 600


def llama_cpp(path: Path) -> Tensor:
    """Logarithms of the next token's probabilities: ``[prompts, vocabulary]``."""
    command = [sys.executable, "-c", SCRIPT, str(path), json.dumps(PROMPTS), str(VOCABULARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return torch.tensor([[each[str(token)] for token in range(VOCABULARY)] for each in found])


def written(folder: Path, case: str, **settings: Any) -> Path:
    """A family's model, or one of these."""
    match case:
        case "qwen3_vl_moe":
            metadata = {"qwen3vlmoe.rope.dimension_sections": [12, 10, 10, 0], "qwen3vlmoe.n_deepstack_layers": 0}
            model = write_model(folder, "qwen3_moe", architecture="qwen3vlmoe", metadata=metadata, **settings)
        case "deepseek_v2":  # which llama.cpp reads without low-rank queries with 27 layers only
            model = write_model(folder, "deepseek_v2", num_hidden_layers=27, **settings)
        case "unsplit latent":
            sizes = {"key_length": 96, "value_length": 64, "key_length_mla": None, "value_length_mla": None}
            old = {"head_count_kv": 4} | sizes
            metadata = {f"deepseek2.attention.{key}": value for key, value in old.items()}
            model = write_model(folder, "deepseek_v3", is_latent_split=False, metadata=metadata, **settings)
        case "gpt_oss in MXFP4":
            experts = dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), "MXFP4")
            model = write_model(folder, "gpt_oss", "Q8_0", experts, **settings)
        case family:
            model = write_model(folder, family, **settings)
    return model.path


def differences(path: Path) -> Tensor:
    """Relative, of each prompt."""
    with load(path) as model, torch.no_grad():
        ours = torch.stack([model.hf(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in PROMPTS])
    theirs = llama_cpp(path)
    spread = theirs - theirs.mean(dim=1, keepdim=True)
    return (ours - theirs).norm(dim=1) / spread.norm(dim=1)


@pytest.mark.parametrize("case", [*SETTINGS, "qwen3_vl_moe", "unsplit latent", "gpt_oss in MXFP4"])
def test_next_token_of_all_experts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    assert differences(written(tmp_path, case, **ALL_EXPERTS)).max() < FURTHER.get(case, FAR)


@pytest.mark.parametrize("family", CHOSEN)
def test_next_token_of_chosen_experts(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    assert (differences(written(tmp_path, family)) < FAR_WITH_TIES).sum() >= LEAST_WITH_TIES


@pytest.mark.parametrize("rule", [*SAME, *SPLITS, "qwen2"])
def test_texts_are_split_as_llama_cpp_does(rule: str, tmp_path: Path) -> None:
    metadata = metadata_of(rule, MERGED_VOCABULARY)
    options = {"num_hidden_layers": 1, "vocab_size": MERGED_VOCABULARY, "eos_token_id": MERGED_VOCABULARY - 1}
    path = write_model(tmp_path / "model", "qwen3_moe", metadata=metadata, **options).path
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(path, read_gguf([path]).metadata, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", TOKENIZE, str(path), TEXT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])["tokens"]
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == theirs
