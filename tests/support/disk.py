"""Reading one record and waiting for it."""

import threading

from offload_moe.memory.disk import DiskMover


def read(mover: DiskMover, key: int, slot: int = 0) -> tuple[int, BaseException | None]:
    """What the mover says of it: bytes, and an error."""
    done = threading.Event()
    result: list[tuple[int, BaseException | None]] = []

    def arrived(slot: int, num_bytes: int, error: BaseException | None) -> None:
        result.append((num_bytes, error))
        done.set()

    mover.start(key, slot, arrived)
    assert done.wait(10)
    assert len(result) == 1
    return result[0]
