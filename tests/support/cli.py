"""The command line as installed, from the source tree, over tiny models: `python -m tests.support.cli ARGUMENTS`."""

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
# For `python -c`: over real models, as installed.
INSTALLED = "import sys; from tests.support.cli import load_cli; sys.exit(load_cli().main(sys.argv[1:]))"


def load_cli() -> ModuleType:
    """The package in `cli/` under its installed name."""
    if "offload_moe_cli" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "offload_moe_cli", ROOT / "cli" / "__init__.py", submodule_search_locations=[str(ROOT / "cli")]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["offload_moe_cli"] = module
        spec.loader.exec_module(module)
    return importlib.import_module("offload_moe_cli.main")


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """An environment whose cache folder is `folder`."""
    names = ("PATH", "HOME", "LANG", "COVERAGE_FILE", "COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "OFFLOAD_MOE_CACHE": str(folder),
        "OFFLOAD_MOE_CONFIG": str(folder / "config.toml"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
        "TERM": "xterm",
        **changes,
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.cli", *arguments]


def run_cli(folder: Path, *arguments: str, stdin: str = "", **changes: str) -> "subprocess.CompletedProcess[str]":
    """One run of the command line in its own process."""
    return subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(folder, **changes),
        timeout=120,
        check=False,
    )


def fake_load(source: str, options: Any = None, *, progress: Any = None) -> Any:
    """Stands in for `offload_moe.load`. The source says what goes well and what does not."""
    from offload_moe.chat import ChatSession
    from offload_moe.errors import StoreCorrupt
    from offload_moe.residency.counters import Counters
    from tests.support.chat import END_OF_TEXT, Scripted, byte_tokenizer, chat_model, ids_of

    if source == "corrupt":
        raise StoreCorrupt("Expert 3 of layer 1 does not match its checksum.\nQuantize the model again.")
    if source == "crash":
        raise ValueError("the sky fell\nin two lines")
    progress("Reading experts", 0.5)
    if source == "stuck":
        threading.Event().wait()
    progress("Reading experts", 2**30, 2**31)
    model = chat_model(max_position_embeddings=100_000)
    tokenizer = byte_tokenizer(None) if source == "no-template" else byte_tokenizer()
    said = {"thinker": "<think>\nHm, 1+1.</think>\nIt is 2 é🙂."}.get(source, "Hello, friend.")
    endless = ids_of(tokenizer, "ha ") * 3000
    script = Scripted(model, endless if source == "endless" else [*ids_of(tokenizer, said), END_OF_TEXT])
    counters = Counters()

    def count(*_: object) -> None:
        counters.num_hits += 3
        counters.num_misses += 1

    def rewind(*_: object) -> None:
        if script.num_calls >= len(script.tokens):
            script.num_calls = 0

    model.register_forward_hook(count)
    model.register_forward_pre_hook(rewind)
    memory = {"experts": 3 * 2**30, "rest": 2**29}
    return SimpleNamespace(
        hf=model,
        tokenizer=tokenizer,
        counters=counters,
        memory=memory,
        peaks={"RAM": (4 * 2**30, 3 * 2**30)},
        notices=["mind the card"] if source == "loud" else [],
        summary="RAM 4.0 GiB of 16.0 GiB",
        options=options,
        chat=lambda *, system=None, raw=False: ChatSession(
            model, tokenizer, counters, memory=lambda: memory, system=system, raw=raw
        ),
        close=lambda: print("closed", file=sys.stderr) if source == "loud" else None,
    )


def fake_load_module() -> ModuleType:
    """Stands in for `offload_moe.engine.load`."""
    module = ModuleType("offload_moe.engine.load")
    module.load = fake_load  # type: ignore[attr-defined]
    return module


if __name__ == "__main__":
    load_cli()
    importlib.import_module("offload_moe_cli.loading").check_model = lambda *_: None  # type: ignore[attr-defined]
    sys.modules["offload_moe.engine.load"] = fake_load_module()
    sys.exit(load_cli().main())
