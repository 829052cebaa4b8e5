"""What a start imports: seconds of every start, which differ with what else is installed."""

import subprocess
import sys

import pytest

from tests.support.cli import ROOT

LIBRARIES = """
import sys
from tests.support.cli import load_cli
load_cli()
from offload_moe_cli.imports import importing
with importing():
    import offload_moe.engine.load
    import offload_moe.serve.host
print(*sys.modules)
import torch
assert torch.distributed.is_available() or not hasattr(torch.distributed, "init_process_group")
import torch._dynamo
print(*torch._dynamo.disable.__module__.split())
"""
COMPILER_USED = """
import sys
from tests.support.cli import load_cli
load_cli()
from offload_moe_cli.imports import importing
with importing():
    import torch
    marked = torch._dynamo.allow_in_graph(len)
    before = "torch._dynamo.config" in sys.modules
    suppressed = torch._dynamo.config.suppress_errors
print(marked is len, before, suppressed, torch._dynamo.__class__.__name__)
"""
HEAVY = ("torch.distributed.tensor", "torch._inductor", "torch.onnx", "sympy", "pandas", "sklearn", "bitsandbytes")


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_package_alone_imports_no_library() -> None:
    modules = set(run("import sys, offload_moe; print(*sys.modules)")[0].split())
    assert not {"torch", "numpy", "transformers", "rich", "huggingface_hub"} & modules
    assert len(modules) < 150


@pytest.mark.slow
def test_a_start_imports_neither_the_compiler_nor_what_it_needs() -> None:
    modules, compiler = run(LIBRARIES)
    found = set(modules.split())
    assert "transformers.modeling_utils" in found
    assert not {*HEAVY, "torch._dynamo"} & found
    assert compiler == "torch._dynamo.decorators"  # the real one, once it is imported


@pytest.mark.slow
def test_what_uses_the_compiler_gets_it() -> None:
    assert run(COMPILER_USED) == ["True False False module"]
