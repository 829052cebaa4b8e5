"""The machine of a plan: measured or described memory, and assumed rates of its links."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from offload_moe.errors import ConfigError
from offload_moe.memory.copier import compute_device, free_device_memory, has_bf16
from offload_moe.plan.budget import SHARE_OF_FREE, default_ram
from offload_moe.simulate import hardware
from offload_moe.system.paths import cache_dir
from offload_moe.system.sizes import format_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes per second, operations per second, and seconds: assumptions, not measured.

    vram: GeForce RTX 3060 12 GB, the slowest of the cards in wide use. Source: NVIDIA's specification.
    device_flops: two fifths of its 25.5 TFLOPS; see `offload_moe.simulate.hardware`.
    ram: dual-channel DDR4-3200, 51.2 GB/s by its standard (JESD79-4), of which kernels reach about four fifths.
    cpu_flops: eight cores at the 50 GFLOP/s that prompts reach on one core of a 2.5 GHz Xeon.
    link: rate of pinned copies over PCIe 4.0 x16; 31.5 GB/s by its standard. disk: a cautious value for NVMe drives.
    layer_s: transformers' Python, 0.7 to 1.1 ms measured on two cores of an EPYC. wave_s: a further wave of experts in
    a layer. probe_s: evaluating a later router ahead. Latencies: per read, per copy.
    For decode steps in one native call: pass_layer_s: Python per layer; ask_s: per request for experts or slots.
    Measured on two cores of a Xeon, see docs/simulate.md.
    For decode steps in the device pass, which has never run on a card: node_s: per launch of a graph; sampling_s: per
    token, behind the pass; step_s: of the host per stepwise layer, published for a loop in C with a synchronization in
    each layer; stop_s: of Python for a layer with an expert on disk.
    """

    vram: float = 360e9
    ram: float = 40e9
    link: float = 25e9
    disk: float = 1e9
    device_flops: float = 10e12
    cpu_flops: float = 400e9
    layer_s: float = 0.9e-3
    wave_s: float = 0.1e-3
    probe_s: float = 0.1e-3
    pass_layer_s: float = 0.15e-3
    ask_s: float = 0.5e-3
    disk_latency_s: float = 0.1e-3
    link_latency_s: float = 30e-6
    node_s: float = 2.5e-6
    sampling_s: float = 1e-3
    step_s: float = 40e-6
    stop_s: float = 0.5e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bytes the process may use. vram_bytes: 0 without a device. disk_bytes: free, None if unknown.

    chosen_dtype: the dtype to compute in; None takes `dtype`'s choice. card: its name in the table, if one was named.
    """

    ram_bytes: int
    vram_bytes: int = 0
    disk_bytes: int | None = None
    rates: Rates = field(default_factory=Rates)
    chosen_dtype: torch.dtype | None = None
    card: str = ""

    @property
    def has_device(self) -> bool:
        return self.vram_bytes > 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in: bf16 on a device (exceptions in `default_dtype`) and fp32 on the CPU."""
        return self.chosen_dtype or (torch.bfloat16 if self.has_device else torch.float32)

    def describe_pass(self) -> str:
        """What is assumed of the device pass, as a sentence."""
        rates = self.rates
        share = f"{hardware.GPU_SHARE:.0%} of the card's bandwidth, " if self.card else ""
        nodes, steps = (
            f"{rates.node_s * 1e6:.2g} us per graph node",
            f"{rates.step_s * 1e6:.2g} us more for a stepwise layer",
        )
        sampling, cpu = f"{rates.sampling_s * 1e3:.2g} ms for sampling", f"the CPU at {rates.ram / 1e9:.0f} GB/s"
        return f"Assumed: {share}{nodes}, {sampling}, {cpu}, {steps}."


def with_card(machine: Machine, name: str, *, vram: int | None = None, link: str | None = None) -> Machine:
    """The machine with a card of the table.

    vram: bytes of the card to use; None takes 90%. link: such as `4x16`; None takes the card's own.

    Raises: ConfigError when the card is not in the table, the link is not usable, or `vram` exceeds the card's memory.
    """
    card = hardware.card_named(name)
    card_bytes = card.vram_gib << 30
    if vram is not None and vram > card_bytes:
        raise ConfigError(f"--vram is {format_size(vram)}, and a {card.name} has {card.vram_gib} GiB. Set less.")
    rates = replace(
        machine.rates,
        vram=card.memory_gbps * 1e9 * hardware.GPU_SHARE,
        device_flops=card.tflops * 1e12 * hardware.FLOPS_SHARE,
        link=hardware.link_bytes_per_s(link or card.link),
    )
    usable = int(card_bytes * SHARE_OF_FREE) if vram is None else vram
    return replace(machine, vram_bytes=usable, rates=rates, card=card.name)


def compute_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in. name: `fp32`, `bf16` or `fp16`; None takes `default_dtype`. Raises: ConfigError."""
    if isinstance(name, torch.dtype) and name.is_floating_point:
        return name
    if name is None:
        return default_dtype(device)
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(f"There is no dtype {name!r} to compute in. Choose one of: {', '.join(DTYPES)}.")
    return DTYPES[name]


def default_dtype(device: torch.device) -> torch.dtype:
    """The default dtype: fp32 on the CPU; on a device bf16, or fp16 if bf16 is only emulated."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bf16(device) else torch.float16


def measure_machine(
    *,
    vram: int | None = None,
    ram: int | None = None,
    rates: Rates | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Machine:
    """This machine, with the given numbers in place of measured ones; 0 bytes of VRAM mean no device.

    device: None takes the accelerator if there is one.

    The disk is measured unless all memory is given, which describes another machine.

    Raises: BudgetError when a device does not report its free memory.
    """
    is_described = vram is not None and ram is not None
    return Machine(
        vram_bytes=_free_vram(device or compute_device()) if vram is None else vram,
        ram_bytes=default_ram() if ram is None else ram,
        disk_bytes=None if is_described else _free_disk(cache_dir()),
        rates=rates or Rates(),
        chosen_dtype=dtype,
    )


def _free_vram(device: torch.device) -> int:
    return 0 if device.type == "cpu" else int(free_device_memory(device) * SHARE_OF_FREE)


def _free_disk(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free
