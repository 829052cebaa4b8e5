"""The self-test's comparison of the device pass with the CPU, on the fake driver."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.card_machine import card_machine
from support.cuda import shim

import offload_moe.engine.load as engine_load
from offload_moe.card.device import CardDevice
from offload_moe.doctor import card_check
from offload_moe.doctor.card_check import Expected, check_card, pass_on_cpu
from offload_moe.doctor.copiers import simulated_copiers
from offload_moe.doctor.outcome import Failed, Skipped
from offload_moe.doctor.self_test import Tests as SelfTests
from offload_moe.doctor.small_model import SmallModel
from offload_moe.engine.device_pass import DevicePass

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def expected(model: SmallModel) -> Expected:
    return pass_on_cpu(model.stores["nf4"].path)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[CardDevice]:
    with card_machine(monkeypatch) as device:
        yield device


def test_the_bits_of_the_cpu(model: SmallModel, expected: Expected, card: CardDevice) -> None:
    assert check_card(model.stores["nf4"].path, expected).startswith("the same bits as the CPU for 4 tokens in 3 ways")


def test_one_bit_of_one_number_is_a_failure(
    model: SmallModel, expected: Expected, card: CardDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = expected.hidden.clone()
    hidden.view(torch.int32)[2, 17] ^= 1
    monkeypatch.setattr(card_check, "WAYS", card_check.WAYS[:1])
    with pytest.raises(Failed, match="1 of 4 tokens have other bits than the CPU's, queued"):
        check_card(model.stores["nf4"].path, replace(expected, hidden=hidden))


def test_numbers_of_zero_prove_nothing(model: SmallModel, expected: Expected) -> None:
    with pytest.raises(Failed, match="all zero"):
        check_card(model.stores["nf4"].path, replace(expected, hidden=torch.zeros_like(expected.hidden)))


def test_without_a_device_pass_it_is_skipped(
    model: SmallModel, expected: Expected, card: CardDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_load, "open_device_pass", lambda *_, **__: DevicePass(reason="there is no NVRTC"))
    with pytest.warns(UserWarning, match="there is no NVRTC"), pytest.raises(Skipped, match="no device pass"):
        check_card(model.stores["nf4"].path, expected)


def test_a_card_has_these_tests(model: SmallModel) -> None:
    tests = {
        kind: [name for name, _ in SelfTests(model, torch.device(kind), simulated_copiers(), 0.0).all()]
        for kind in ("cpu", "cuda")
    }
    added = {"device pass against CPU, nf4", "device pass against CPU, int8"}
    assert added <= set(tests["cuda"])
    assert not added & set(tests["cpu"])
