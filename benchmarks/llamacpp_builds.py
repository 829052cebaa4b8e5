"""The builds of llama.cpp that are measured: built for this processor, and the prebuilt wheel."""

import argparse
import sys
from typing import Any

from harness import HERE, has_llamacpp, run_json

NATIVE, WHEEL = "llama.cpp native", "llama.cpp wheel"
RUNNER = str(HERE / "peers/run_llamacpp.py")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--native", metavar="PYTHON", help="that has llama.cpp built for this processor")
    parser.add_argument("--wheel", metavar="PYTHON", help="that has the wheel xllamacpp; without both, this one's")


def chosen_pythons(options: argparse.Namespace) -> dict[str, str]:
    """Build -> the Python that has it."""
    pythons = {NATIVE: options.native, WHEEL: options.wheel}
    if not any(pythons.values()) and has_llamacpp():
        pythons[WHEEL] = sys.executable
    return {name: python for name, python in pythons.items() if python}


def describe_builds(pythons: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Versions and instructions. Raises: SystemExit where one is missing, or the native one is for other processors."""
    try:
        builds = {name: run_json([python, RUNNER, "--describe"]) for name, python in pythons.items()}
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    missing = builds.get(NATIVE, {}).get("missing_instructions", [])
    if missing:
        raise SystemExit(
            f"llama.cpp of {pythons[NATIVE]} was built without {', '.join(missing)}, which this processor has. Build it"
            " here, as docs/benchmarks.md says."
        )
    if NATIVE in builds and "missing_instructions" not in builds[NATIVE]:
        raise SystemExit(f"{pythons[NATIVE]} has no llama-cpp-python. Build it, as docs/benchmarks.md says.")
    return builds
