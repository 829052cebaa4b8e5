"""The driver's table is filled at run time, and what keeps it from working is said."""

import ctypes
import ctypes.util
from pathlib import Path

import pytest
from support.cuda import shim
from support.cuda.fake import FakeDriver

from offload_moe.errors import DevicePassUnavailable, TransferError
from offload_moe.native.driver import Driver

needs_compiler = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")


@needs_compiler
def test_a_card_is_described() -> None:
    with FakeDriver(architecture=89, num_cards=2, vram=12 << 30) as fake, Driver(fake.path) as driver:
        assert driver.card().device == 0
        card = driver.card(1)
        assert card.device == 1
        with pytest.raises(TransferError, match="could not describe card 2"):
            driver.card(2)
        assert (card.name, card.major, card.minor, card.num_cards) == (b"Fake card", 8, 9, 2)
        assert (card.num_bytes, card.driver_version, card.maps_host_memory) == (12 << 30, 13000, 1)
        assert (card.memory_bits, card.num_multiprocessors, card.has_watchdog) == (192, 28, 1)


@needs_compiler
def test_codes_have_the_drivers_names() -> None:
    with FakeDriver() as fake, Driver(fake.path) as driver:
        assert driver.describe(2) == "CUDA_ERROR_OUT_OF_MEMORY (2: injected)"
        assert driver.describe(4711) == "an unknown error (4711: injected)"
        driver.check(0, "do nothing")
        with pytest.raises(TransferError, match=r"^The driver could not lock pages: CUDA_ERROR_NOT_SUPPORTED \(801"):
            driver.check(801, "lock pages")


@needs_compiler
def test_a_failing_question_is_an_error() -> None:
    with FakeDriver() as fake, Driver(fake.path) as driver:
        fake.fail("cuDeviceTotalMem_v2", 999)
        with pytest.raises(TransferError, match=r"could not describe card 0: an unknown error \(999"):
            driver.card()


@needs_compiler
@pytest.mark.parametrize(
    ("call", "code", "reason"),
    [("cuInit", 804, r"does not start: an unknown error \(804"), ("cuDeviceGetCount", 100, "CUDA_ERROR_NO_DEVICE")],
)
def test_a_driver_that_does_not_start_says_why(call: str, code: int, reason: str) -> None:
    with FakeDriver() as fake:
        fake.fail(call, code)
        with pytest.raises(DevicePassUnavailable, match=reason):
            Driver(fake.path)


@needs_compiler
def test_a_machine_without_a_card_is_told_apart() -> None:
    with FakeDriver(num_cards=0) as fake, pytest.raises(DevicePassUnavailable, match="CUDA_ERROR_NO_DEVICE"):
        Driver(fake.path)


def test_a_library_that_is_not_there_is_named() -> None:
    with pytest.raises(DevicePassUnavailable, match=r"^there is no /nonesuch/libcuda\.so\.1$"):
        Driver("/nonesuch/libcuda.so.1")


def test_a_driver_without_a_function_is_too_old() -> None:
    name = ctypes.util.find_library("m")
    assert name is not None
    with pytest.raises(DevicePassUnavailable, match=r"has no cuInit: CUDA 12 needs a newer driver \(525 at least\)"):
        Driver(name)


def test_without_a_path_the_systems_driver_is_meant() -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a card")
    with pytest.raises(DevicePassUnavailable, match="libcuda"):
        Driver()
