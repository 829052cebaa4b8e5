"""Which C files a token goes through: a build of the native library that counts lines, in a process of its own.

Run as a program it computes tokens, some of which miss experts, and writes what was counted during these.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

from offload_moe.families.cache_name import cache_from, with_cache

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "offload_moe/native"
COUNTERS = """
void __gcov_reset(void);
void __gcov_dump(void);
void om_trace_reset(void) { __gcov_reset(); }
void om_trace_dump(void) { __gcov_dump(); }
"""
FLAGS = ("-std=c11", "-O0", "--coverage", "-w", "-fPIC")


def build(folder: Path) -> Path:
    """Put a package with such a library into this folder; its instruction set is the portable one, which is small."""
    sources = folder / "native" / "csrc"
    for part in ("csrc", "cuda"):
        (folder / "native" / part).mkdir(parents=True)
        for path in (NATIVE / part).iterdir():
            (folder / "native" / part / path.name).write_bytes(path.read_bytes())
    dispatch = sources / "dispatch.c"
    dispatch.write_text(dispatch.read_text().replace("defined(__x86_64__)", "0"))
    (sources / "trace.c").write_text(COUNTERS)
    package = folder / "package" / "offload_moe"
    (package / "native").mkdir(parents=True)
    for original, names in ((ROOT / "offload_moe", package), (NATIVE, package / "native")):
        for path in original.iterdir():
            if path != NATIVE and path.suffix != ".so":
                (names / path.name).symlink_to(path)
    objects = [f"{path.stem}.o" for path in sorted(sources.glob("*.c"))]
    for name in objects:
        subprocess.run(["gcc", *FLAGS, "-c", f"{Path(name).stem}.c", "-o", name], cwd=sources, check=True)
    link = [
        "gcc",
        "-shared",
        "--coverage",
        *objects,
        "-pthread",
        "-lm",
        "-ldl",
        "-o",
        package / "native" / "_native.so",
    ]
    subprocess.run(link, cwd=sources, check=True)
    return package.parent


def files_of_tokens(store: Path, folder: Path) -> set[str]:
    """Names of the C files, headers too, of which a line is executed in tokens that miss experts."""
    package, sources = build(folder), folder / "native" / "csrc"
    environment = os.environ | {"PYTHONPATH": f"{package}:{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-m", "support.c_trace", store], env=environment, check=True, cwd=folder)
    found = set()
    for counts in sources.glob("*.gcda"):
        command = ["gcov", "--json-format", "--stdout", counts.name]
        lines = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=True).stdout
        for file in (file for line in lines.splitlines() for file in json.loads(line)["files"]):
            if "/" not in file["file"] and any(line["count"] for line in file["lines"]):
                found.add(file["file"])
    return found - {"trace.c"}


def main(store: Path) -> None:
    import torch

    import offload_moe
    from support.models import open_model
    from support.tiny_models import tiny_prompt

    library = ctypes.CDLL(str(Path(offload_moe.__file__).parent / "native" / "_native.so"))
    with torch.inference_mode(), open_model(store, 12, prefetch=0) as model:
        cache = cache_from(model.hf(input_ids=tiny_prompt(1, 9)[0], use_cache=True))
        before = model.stats.copy()
        library.om_trace_reset()
        for token in range(20):
            model.hf(input_ids=torch.tensor([[5 + token]]), **with_cache(cache), use_cache=True)
        library.om_trace_dump()
        assert model.stats.since(before).num_misses > 0
        os._exit(0)  # what ends later is not counted


if __name__ == "__main__":
    main(Path(sys.argv[1]))
