"""The doctor and its self-test on a real card: ``pytest -m gpu tests/gpu``."""

import pytest
import torch

from offload_moe.doctor import examine
from offload_moe.doctor.self_test import describe_device, self_test

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def card() -> None:
    if not torch.accelerator.is_available():
        pytest.skip("no device")


def test_the_self_test_passes_on_the_card_in_under_two_minutes() -> None:
    outcomes = list(self_test())
    assert "simulated" not in describe_device()
    assert [outcome for outcome in outcomes if outcome.status == "fail"] == []
    assert sum(outcome.seconds for outcome in outcomes) < 120


def test_the_card_is_examined() -> None:
    checks = {check.name: check for check in examine()}
    assert not any("could not be examined" in check.found for check in checks.values())
    assert checks["torch on the GPU"].verdict == "ok"
    assert checks["device kernels"].verdict == "ok"
    assert checks["H2D, page-locked"].numbers["h2d_page_locked_bytes_per_s"] > 1e9
