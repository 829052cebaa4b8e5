"""Extensions in whole models: the tokens that they should give, and failures that end in an error at once."""

import sys
from pathlib import Path

import pytest
import torch
from support.chat import chat_store
from support.models import open_model

from offload_moe.errors import ConfigError, ModelClosed
from tests.support.extensions import Site

IDS = torch.tensor([[3, 17, 5, 80, 41]])
FEW = 4  # slots, fewer than the experts that a chunk takes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"))


def generate(model: object) -> list[int]:
    hf = model.hf  # type: ignore[attr-defined]
    tokens = hf.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, disable_compile=True)
    return list(tokens[0].tolist())


@pytest.mark.usefixtures("example")
def test_a_policy_decides_in_a_model_and_changes_no_token(store: Path) -> None:
    with open_model(store, FEW) as model:
        expected = generate(model)
    with open_model(store, FEW, policy="least-weight") as model:
        assert generate(model) == expected
        policy = model.engine.hierarchy.ram.residency.policy
        assert policy.name == "least-weight"
        assert model.engine.hierarchy.ram.residency.num_evictions > 0
    assert len(set(expected)) > 6


@pytest.mark.parametrize("method", ["access", "insert", "victim", "remove"])
def test_a_policy_that_fails_ends_every_token_from_then_on(store: Path, site: Site, method: str) -> None:
    text = f"""
from offload_moe.residency.policy.lru import LRU
calls = []
class Torn(LRU):
    def __init__(self, *_):
        super().__init__()
    def {method}(self, *arguments):
        calls.append(arguments)
        if len(calls) == 12:
            raise ValueError("twelve")
        return super().{method}(*arguments)
"""
    site.write("torn-moe", {"offload_moe.policies": {"torn": "torn:Torn"}}, torn=text)
    with open_model(store, FEW, policy="torn") as model:
        with pytest.raises(ConfigError, match=r"The policy 'torn' of torn-moe 1\.0 failed: ValueError: twelve\."):
            for _ in range(3):
                generate(model)
        with pytest.raises(ConfigError, match="twelve"):
            generate(model)
        residency = model.engine.hierarchy.ram.residency
        assert not any(map(residency.num_leases, range(FEW)))
        assert len(sys.modules["torn"].calls) == 12
    with pytest.raises(ModelClosed):
        generate(model)
