"""The self-test: the engine's results on this machine, compared with transformers' own."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from offload_moe.convert.repair import find_damage
from offload_moe.doctor.card_check import check_card, pass_on_cpu
from offload_moe.doctor.copiers import Copiers, copiers_for
from offload_moe.doctor.demo_check import check_demo
from offload_moe.doctor.outcome import Failed, Outcome, run_check
from offload_moe.doctor.overlap import check_overlap
from offload_moe.doctor.rig import Setting, overwrite_what_was_released, running
from offload_moe.doctor.small_model import (
    CODECS,
    HIDDEN,
    NUM_EXPERTS,
    NUM_LAYERS,
    SmallModel,
    logits_of,
    relative_error,
)
from offload_moe.memory.copier import compute_device
from offload_moe.system.progress import Progress, silent

SAME_NUMBERS, SAME_NUMBERS_ON_DEVICE = 1e-4, 1e-3  # fp32, sums in another order: 2e-6 measured on CPUs
FAST_KERNELS = 0.05  # activations in 8 bits: 1.5e-2 measured
ALL_SLOTS = NUM_LAYERS * NUM_EXPERTS
POOLS = ((1, 1), (3, 2), (ALL_SLOTS, 5), (ALL_SLOTS, ALL_SLOTS))  # slots in RAM, and on the device
SLEEP_CYCLES = 2_000_000
QUANTIZED = ("nf4", "int8")  # codecs that the device pass has kernels for

Check = Callable[[], str]


def self_test(progress: Progress = silent, copiers: Copiers | None = None) -> Iterator[Outcome]:
    """Every check, as it is done; all together well under two minutes.

    copiers: None takes the device's, or simulated ones without a device.
    """
    device = compute_device()
    with tempfile.TemporaryDirectory(prefix="offload-moe-self-test-") as folder:
        progress("Self-test: making a small model")
        begun = time.perf_counter()
        model = SmallModel(Path(folder))
        tests = Tests(model, device, copiers or copiers_for(device), time.perf_counter() - begun)
        for name, check in tests.all():
            progress(f"Self-test: {name}")
            yield run_check(name, check)


def describe_device() -> str:
    """The device of the self-test's device tests, as text."""
    device = compute_device()
    return "a simulated accelerator, because there is no GPU here" if device.type == "cpu" else str(device)


class Tests:
    """The checks. Each returns its finding, or raises `Failed`."""

    def __init__(self, model: SmallModel, device: torch.device, copiers: Copiers, seconds_to_make: float) -> None:
        self._model = model
        self._device = device
        self._copiers = copiers
        self._seconds_to_make = seconds_to_make
        self._on_cpu = Setting()
        self._on_device = Setting(device=device, make_copier=copiers.calm)
        self._expected = cache(lambda codec, where: logits_of(model.oracle(codec, where)))

    def all(self) -> Iterator[tuple[str, Check]]:
        kind = "simulated device" if self._device.type == "cpu" else "device"
        yield "store", self._store
        for codec in CODECS:
            yield f"CPU against oracle, {codec}", partial(self._against_oracle, codec, self._on_cpu)
        for codec in CODECS:
            yield f"{kind} against oracle, {codec}", partial(self._against_oracle, codec, self._on_device)
        for codec in CODECS:
            yield f"{kind} against CPU, {codec}", partial(self._against_cpu, codec)
        if self._device.type == "cuda":
            for codec in QUANTIZED:
                yield f"device pass against CPU, {codec}", partial(self._device_pass, codec)
        yield "CPU, fast kernels", self._fast_kernels
        yield "CPU, any number of slots", partial(self._any_slots, self._on_cpu)
        yield f"{kind}, any number of slots", partial(self._any_slots, self._on_device)
        yield f"{kind}, races", self._races
        yield f"{kind}, overlap", partial(check_overlap, self._device, self._copiers.calm)
        yield "demo model", check_demo

    def _store(self) -> str:
        damages = [damage.piece.name for store in self._model.stores.values() for damage in find_damage(store)]
        if damages:
            raise Failed(f"{damages[0]} was read back with other bytes ({len(damages)} such pieces)")
        return f"{len(self._model.stores)} stores made in {self._seconds_to_make:.1f} s and read back whole"

    def _against_oracle(self, codec: str, setting: Setting) -> str:
        return _compare(self._logits(codec, setting), self._expected(codec, setting.device), _limit(setting))

    def _against_cpu(self, codec: str) -> str:
        return _compare(
            self._logits(codec, self._on_device), self._logits(codec, self._on_cpu), _limit(self._on_device)
        )

    def _device_pass(self, codec: str) -> str:
        store = self._model.stores[codec].path
        return check_card(store, pass_on_cpu(store))

    def _fast_kernels(self) -> str:
        """One layer alone, because a later router may choose differently after an allowed difference."""
        hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
        ids = torch.tensor([[token % 3, 3, 5 + token % 3] for token in range(5)])
        weights = torch.full(ids.shape, 0.3)
        outputs = []
        for is_exact in (True, False):
            setting = replace(self._on_cpu, is_exact=is_exact)
            with running(self._model.stores["nf4"], setting) as rig, torch.inference_mode():
                outputs.append(rig.experts[0](hidden, ids, weights))
        return _compare(outputs[1], outputs[0], FAST_KERNELS)

    def _any_slots(self, setting: Setting) -> str:
        found = [
            self._logits("nf4", replace(setting, num_ram_slots=ram, num_device_slots=on_device, prefetch=prefetch))
            for ram, on_device in POOLS
            for prefetch in (0, 2)
        ]
        return _same_bits(found, f"{len(found)} runs, {len(POOLS)} numbers of slots, with and without prefetch")

    def _races(self) -> str:
        """Late copies, late compute, and every slot overwritten as early as allowed."""
        found = [self._logits("nf4", self._on_device)]
        for ram, on_device in POOLS:
            for make_copier in self._copiers.late:
                setting = replace(
                    self._on_device, make_copier=make_copier, num_ram_slots=ram, num_device_slots=on_device
                )
                with running(self._model.stores["nf4"], setting) as rig:
                    self._delay_compute(rig.experts)
                    overwrite_what_was_released(rig)
                    found.append(logits_of(rig.hf))
        return _same_bits(found, f"{len(found)} runs, with late copies and slots overwritten at once")

    def _delay_compute(self, experts: list[nn.Module]) -> None:
        if self._device.type == "cuda":
            sleep = torch.get_device_module(self._device)._sleep
            for module in experts:
                module.register_forward_pre_hook(lambda *_: sleep(SLEEP_CYCLES))

    def _logits(self, codec: str, setting: Setting) -> Tensor:
        with running(self._model.stores[codec], setting) as rig:
            return logits_of(rig.hf)


def _limit(setting: Setting) -> float:
    return SAME_NUMBERS if setting.device.type == "cpu" else SAME_NUMBERS_ON_DEVICE


def _compare(found: Tensor, expected: Tensor, limit: float) -> str:
    if not expected.abs().max() > 0:
        raise Failed("the expected numbers are all zero, so the comparison proves nothing")
    if torch.equal(found, expected):
        return "the same bits"
    error = relative_error(found, expected)
    if not error <= limit:
        raise Failed(f"differs by {error:.1e} of the largest number, {limit:.0e} is allowed")
    return f"differs by {error:.1e} of the largest number, {limit:.0e} is allowed"


def _same_bits(found: list[Tensor], what: str) -> str:
    different = sum(not torch.equal(logits, found[0]) for logits in found[1:])
    if different:
        raise Failed(f"{different} gave other bits than the first, of {what}")
    return f"the same bits in {what}"
