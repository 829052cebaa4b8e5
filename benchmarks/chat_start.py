"""How long `offload-moe chat` takes to its prompt and to its model, and what the time is spent on.

    python benchmarks/chat_start.py demo

Seconds until each sign appears on a pseudo terminal, then the import time of each package (`python -X importtime`,
which itself slows imports down). The first run warms the caches and is not counted.
"""

import argparse
import os
import pty
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence

import harness

START = "import sys; from offload_moe_cli.main import main; sys.exit(main(sys.argv[1:]))"
# What appears on the screen at the end of each phase, in this order.
PHASES = {
    "interpreter and arguments": b"\x1b[?2004h",
    "line editor": b"\x1b[?2004l",
    "prompt": b"\x1b[?2004h",
    "model": b"is ready",
}
IMPORT = "import offload_moe.engine.load"
NUM_PACKAGES = 8
NUM_WARMUPS = 1
LIMIT_S = 120


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args(arguments)
    runs = [time_phases(options.model) for _ in range(NUM_WARMUPS + options.trials)][NUM_WARMUPS:]
    phases = {name: harness.spread([run[name] for run in runs]) for name in (*PHASES, "in all")}
    imports = import_seconds()
    print(f"| until {options.model} is ready | median s | min | max |\n|---|---|---|---|")
    for name, seconds in phases.items():
        print(f"| {name} | {seconds['median']:.2f} | {seconds['min']:.2f} | {seconds['max']:.2f} |")
    print("\n| imports of the libraries | s |\n|---|---|")
    for package, seconds in imports.items():
        print(f"| {package} | {seconds:.2f} |")
    harness.finish({"benchmark": "chat_start", "model": options.model, "phases_s": phases, "imports_s": imports})


def time_phases(model: str) -> dict[str, float]:
    """Seconds of each phase of one start, and of all."""
    master, slave = pty.openpty()
    begin_s = time.perf_counter()
    command = [sys.executable, "-c", START, "chat", model]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as process:
        os.close(slave)
        watch = threading.Timer(LIMIT_S, process.kill)  # the next read fails then
        watch.daemon = True
        watch.start()
        ends_s = [_seconds_until(master, sign) for sign in PHASES.values()]
        os.write(master, b"\x04")
        _drain(master)
        process.wait()
        watch.cancel()
    os.close(master)
    seconds = [end - begin for begin, end in zip([begin_s, *ends_s], ends_s, strict=False)]
    return dict(zip(PHASES, seconds, strict=True)) | {"in all": ends_s[-1] - begin_s}


def _seconds_until(master: int, sign: bytes) -> float:
    """The time when `sign` has appeared."""
    seen = b""
    while sign not in seen:
        # One byte at a time: what follows the sign belongs to the next phase.
        seen += os.read(master, 1)
    return time.perf_counter()


def _drain(master: int) -> None:
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        # The other end is closed.
        return


def import_seconds() -> dict[str, float]:
    """Seconds that importing each package took by itself, the largest first."""
    command = [sys.executable, "-X", "importtime", "-c", IMPORT]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    seconds: Counter[str] = Counter()
    for line in lines:
        own_us, _, name = (part.strip() for part in line.removeprefix("import time:").split("|"))
        if own_us.isdigit():
            seconds[name.partition(".")[0]] += int(own_us)
    largest = dict(seconds.most_common(NUM_PACKAGES))
    largest["others"] = seconds.total() - sum(largest.values())
    return {package: microseconds / 1e6 for package, microseconds in largest.items()}


if __name__ == "__main__":
    main()
