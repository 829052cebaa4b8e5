"""The self-test passes on a machine that is well, and each kind of fault makes the check for it fail."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_moe.convert.quantize import quantize
from offload_moe.doctor import self_test as self_test_module
from offload_moe.doctor.copiers import Copiers, simulated_copiers
from offload_moe.doctor.demo_check import check_demo
from offload_moe.doctor.outcome import Failed, Outcome, Skipped, run_check
from offload_moe.doctor.rig import Setting, running
from offload_moe.doctor.self_test import Tests as SelfTests
from offload_moe.doctor.small_model import NUM_EXPERTS, NUM_LAYERS, SmallModel, logits_of
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.experts.native import NativeArithmetic
from offload_moe.memory.copier import Marker
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.native.kernels import PlaceStruct, Reads
from offload_moe.residency.residency import Residency
from offload_moe.store import Record, Store
from tests.support.chat import byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.cli import load_cli

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="expects the simulated accelerator")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("small"))


def outcomes(model: SmallModel, copiers: Copiers | None = None, but: Iterable[str] = ()) -> dict[str, Outcome]:
    tests = SelfTests(model, CPU, copiers or simulated_copiers(), 0.0)
    return {name: run_check(name, check) for name, check in tests.all() if name not in but and name != "demo model"}


def failures(found: dict[str, Outcome]) -> set[str]:
    return {name for name, outcome in found.items() if outcome.status == "fail"}


OVERLAP = "simulated device, overlap"  # measures time, so a busy machine may fail it
SLOW = ("CPU, any number of slots", "simulated device, any number of slots", "simulated device, races")


def test_all_is_well_on_the_simulated_accelerator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr("offload_moe.doctor.examination.measurements", lambda _: [])
    status = load_cli().main(["doctor", "--self-test", "--json"])
    document = json.loads(capsys.readouterr().out)
    tests = {test["name"]: test for test in document["self_test"]["tests"]}
    assert "simulated" in document["self_test"]["device"]
    assert {name for name, test in tests.items() if test["status"] != "pass"} == {"demo model"}
    assert tests["demo model"]["status"] == "skip"
    assert tests["CPU against oracle, bf16"]["found"] == "the same bits"
    assert status == any(check["verdict"] == "problem" for check in document["checks"])
    assert list(tmp_path.iterdir()) == []


def test_every_expert_is_computed(model: SmallModel) -> None:
    """A fault in one that is not would pass."""
    with running(model.stores["nf4"], Setting()) as rig:
        logits_of(rig.hf)
        assert len(rig.hierarchy.ram.residency.resident_keys()) == NUM_LAYERS * NUM_EXPERTS


class NeverWaiting(SimulatedCopier):
    """Says that a copy has arrived when it is only issued."""

    def copy(self, *arguments: Any, **settings: Any) -> Marker:
        self._delay_s = lambda: 0.005  # else a copy is sometimes there in time by luck
        marker = super().copy(*arguments, **settings)
        marker.wait = lambda: None  # type: ignore[method-assign]
        return marker


class OneAfterTheOther(SimulatedCopier):
    """Copies while the caller waits."""

    def copy(self, *arguments: Any, **settings: Any) -> Marker:
        marker = super().copy(*arguments, **settings)
        marker.wait()
        return marker


class Broken(SimulatedCopier):
    """Cannot copy."""

    def copy(self, *arguments: Any, **settings: Any) -> Marker:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")


def test_a_missing_wait_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr("offload_moe.doctor.examination.measurements", lambda _: [])
    monkeypatch.setattr(self_test_module, "copiers_for", lambda _: simulated_copiers(NeverWaiting))
    monkeypatch.setattr(self_test_module, "POOLS", self_test_module.POOLS[2:3])
    assert load_cli().main(["doctor", "--self-test"]) == 1
    out = capsys.readouterr().out
    for codec in ("nf4", "int8", "bf16"):
        assert f"fail     simulated device against oracle, {codec}" in out
    assert "fail     simulated device, races" in out
    assert "pass     CPU against oracle, nf4" in out
    assert "Self-test, device tests on a simulated accelerator, because there is no GPU here:" in out


def test_copies_that_do_not_overlap_are_found(model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.doctor.overlap.MAX_TRIALS", 4)
    assert failures(outcomes(model, simulated_copiers(OneAfterTheOther), but=SLOW)) == {OVERLAP}


def test_a_link_that_is_broken_is_a_failure_and_not_the_end(model: SmallModel) -> None:
    found = outcomes(model, simulated_copiers(Broken), but=SLOW)
    assert failures(found) == {name for name in found if name.startswith("simulated device")}
    assert "TransferError: Copying expert record" in found["simulated device against oracle, nf4"].found
    assert found[OVERLAP].found.startswith("RuntimeError: CUDA error")


def slightly_off(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **settings: forward(*arguments, **settings) * 1.001


def test_a_wrong_kernel_is_found(model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeArithmetic, "forward", slightly_off(NativeArithmetic.forward))
    found = failures(outcomes(model, but=(*SLOW, OVERLAP)))
    assert found == {f"{what}, {codec}" for what in AGAINST_THE_CPU for codec in ("nf4", "int8")}


AGAINST_THE_CPU = ("CPU against oracle", "simulated device against CPU")


def test_wrong_arithmetic_on_the_device_is_found(model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceArithmetic, "forward", slightly_off(DeviceArithmetic.forward))
    found = failures(outcomes(model, but=(*SLOW, OVERLAP)))
    against = ("simulated device against oracle", "simulated device against CPU")
    assert found == {f"{what}, {codec}" for what in against for codec in ("nf4", "int8", "bf16")}


def test_an_expert_read_from_the_wrong_place_is_found(model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum is right, only it is another expert's."""
    record = Store.record

    def neighbour(self: Store, layer: int, expert: int) -> Record:
        return record(self, layer, expert ^ 1 if (layer, expert) == (0, 4) else expert)

    monkeypatch.setattr(Store, "record", neighbour)
    assert {"CPU against oracle, nf4", "simulated device against oracle, nf4"} <= failures(outcomes(model, but=SLOW))


def test_an_evicted_lease_is_found(model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Residency, "_must_stay", lambda *_: False)
    found = failures(outcomes(model, but=["simulated device, races"]))
    assert found & {"CPU, any number of slots", "simulated device, any number of slots"}


def test_a_damaged_record_is_found(tmp_path: Path) -> None:
    model = SmallModel(tmp_path)
    record = model.stores["int8"].record(1, 3)
    with record.path.open("r+b") as file:
        file.seek(record.offset + 10)
        byte = file.read(1)[0]
        file.seek(record.offset + 10)
        file.write(bytes([byte ^ 1]))
    found = outcomes(model, but=(*SLOW, OVERLAP))
    assert "store" in failures(found)
    assert found["store"].found.startswith("expert 3 of layer 1")
    assert {"CPU against oracle, int8", "simulated device against CPU, int8"} <= failures(found)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store in the cache that was made from something that is named as the demo is."""
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    folder = tmp_path / "demo" / "SmolLM2-135M-Instruct-MoE-01234567"
    sizes = {"vocab_size": 264, "num_experts": 16, "num_experts_per_tok": 4}
    model = write_checkpoint(folder, "qwen2_moe", dtype=torch.float32, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(5.0 if "experts" in name else 1.0)  # or what the experts say would not matter
    model.save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return quantize(folder, tmp_path / "stores" / "demo-nf4", codec="nf4")


def test_the_demo_says_the_same_with_few_slots(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_demo()
    assert found.startswith("the same 12 tokens")
    assert "(0 evictions)" not in found
    submit, num_reads, store = Reads.submit, Counter[tuple[int, int]](), Store.open(demo)

    def wrong_after_eviction(self: Reads, key: int, slot: int, *, is_prefetch: bool = False) -> None:
        num_reads[id(self), key] += 1
        if num_reads[id(self), key] > 1:
            layer, expert = divmod(key, store.num_experts)
            record = store.record(layer, expert ^ 1)
            place = {"offset": record.offset, "num_bytes": record.num_bytes, "checksum": record.checksum}
            self.place(key, PlaceStruct(file=0, **place))
        submit(self, key, slot, is_prefetch=is_prefetch)

    monkeypatch.setattr(Reads, "submit", wrong_after_eviction)
    with pytest.raises(Failed, match="with many slots"):
        check_demo()


def test_without_a_demo_there_is_nothing_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    with pytest.raises(Skipped, match="offload-moe chat"):
        check_demo()
