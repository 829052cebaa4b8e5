"""Suites of other people's against the server: `llm-comply`, and schemathesis on our own OpenAPI document."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_moe.engine.model import Model
from tests.support.chat import ids_of
from tests.support.serving import listening

SAID = 'Say "hi" to all.'
END = 256
SUITES = {
    "openai-chat": "openai_chat.json",
    "anthropic": "anthropic.json",
    "open-responses": "openresponses.json",
}
# Probes that fail by design: models that read text alone, and no `/responses/compact`, whose probes take a 404.
NOT_PASSED = {"chat-image-input", "anth-image-input", "image-input"}


@pytest.fixture
def talkative(model: Model) -> Iterator[None]:
    """Every answer is the same text, and ends; where a grammar forbids the end, the text begins again."""
    tokens = [*ids_of(model.tokenizer, SAID), END]
    at = 0

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal at
        at = 0 if kwargs["input_ids"].shape[1] > 1 else at + 1

    def say(module: Any, args: Any, output: Any) -> Any:
        output.logits = torch.full_like(output.logits, -10.0)
        output.logits[..., tokens[at % len(tokens)]] = 10.0
        return output

    handles = [model.hf.register_forward_pre_hook(begin, with_kwargs=True), model.hf.register_forward_hook(say)]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonschema
@pytest.mark.parametrize("suite", SUITES)
def test_llm_comply(suite: str, model: Model, talkative: None) -> None:
    """`python -m llm_comply.cli --base-url URL --api-key KEY --format openai-chat` is the same by hand."""
    package = pytest.importorskip("llm_comply")
    from llm_comply.config import ComplianceConfig
    from llm_comply.runner import TestRunner
    from llm_comply.schema import SpecLoader
    from llm_comply.tests import get_tests

    spec = Path(package.__file__).parent / "specs" / SUITES[suite]
    with listening(model) as (host, port):
        config = ComplianceConfig(base_url=f"http://{host}:{port}/v1", api_key="x", model="tiny")
        results = TestRunner(config, get_tests(suite), SpecLoader(str(spec))).run_all().results
    failed = {each.id: each.errors for each in results if each.status.value == "failed"}
    assert failed.keys() == NOT_PASSED & {each.id for each in results}, failed
    assert sum(each.status.value == "passed" for each in results) >= 7


@pytest.mark.conformance
def test_schemathesis(model: Model, talkative: None, tmp_path: Path) -> None:
    """No answer of 500 and above, and none that contradicts the OpenAPI document."""
    pytest.importorskip("schemathesis")
    with listening(model, queue=1000) as (host, port):
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"http://{host}:{port}/openapi.json"),
            *("--phases", "fuzzing", "--max-examples", os.environ.get("OFFLOAD_MOE_CASES", "200")),
            *("--checks", "not_a_server_error,response_schema_conformance,content_type_conformance"),
            *("--request-timeout", "60", "--no-color", "--seed", "1"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
