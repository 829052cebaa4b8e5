"""The result of a simulation. Every figure here is simulated."""

from dataclasses import asdict, dataclass
from typing import Any

BASIS = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Seconds and bytes are per decoded token, rates 0 to 1, over the counted answers.

    hit_rate: of the fast tier, without delayed hits; ram_hit_rate: of the RAM tier behind a device, None without one.
    device_wait_s: the host's wait for the device. num_prefetches, num_useful_prefetches: per token.
    prompt_tokens_per_s: 0 without prompts; first_token_s: the mean time of a prompt.
    num_computed_on_cpu: missing experts that the CPU has computed, per token. stepwise_rate: share of the passes of a
    device that went stepwise; None without such passes.
    """

    decode_tokens_per_s: float
    prompt_tokens_per_s: float
    first_token_s: float
    num_decode_tokens: int
    num_prompt_tokens: int
    token_s: float
    slow_token_s: float  # 95th percentile
    stall_s: float
    device_wait_s: float
    hit_rate: float
    delayed_hit_rate: float
    ram_hit_rate: float | None
    disk_bytes: float
    h2d_bytes: float
    num_prefetches: float
    num_useful_prefetches: float
    num_computed_on_cpu: float
    stepwise_rate: float | None


def simulation_to_json(simulation: Simulation) -> dict[str, Any]:
    """Ready for `json.dumps`, with its label."""
    return {"basis": BASIS, **asdict(simulation)}
