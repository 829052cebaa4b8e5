"""The cost model of the simulation and of the plan's closed form.

T tokens of a forward, t tokens of one expert.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCosts:
    """Decode by the device pass. Seconds; a layer is one with experts, and has its share of what others launch.

    token_s: per token, outside of layers: the first and the last graph, and sampling.
    queued_nodes_s, stepwise_nodes_s: launches of a layer; take_s: one more where the CPU has computed experts.
    step_s: of the host for a layer that is waited for. stop_s: Python's part where an expert is on disk.
    fetch_s: a record over the link. cpu_s: an expert on the CPU.
    """

    token_s: float = 0.0
    queued_nodes_s: float = 0.0
    stepwise_nodes_s: float = 0.0
    take_s: float = 0.0
    step_s: float = 0.0
    stop_s: float = 0.0
    fetch_s: float = 0.0
    cpu_s: float = 0.0

    def before_experts(self, num_missing: float, *, is_stepwise: bool) -> float:
        """Seconds of a layer beside its dense weights and experts: launches, and the host's part."""
        if not is_stepwise:
            return self.queued_nodes_s
        return self.stepwise_nodes_s + self.step_s + min(1.0, num_missing) * self.take_s

    def missing(self, num_missing: float, expert_s: float, *, is_stepwise: bool) -> float:
        """Seconds until what is missing is computed, beside the other experts. expert_s: of one on the card."""
        return num_missing * (self.cpu_s if is_stepwise else self.fetch_s + expert_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCosts:
    """Seconds. "Host" is the time of the calling thread; the rest is arithmetic, which on a device runs concurrently.

    token_host_s, token_s: per forward, outside the layers: embeddings, output head, sampling.
    layer_host_s: per MoE layer and forward, transformers' Python and the acquire.
    dense_s: reading a layer's dense weights and cache once; dense_token_s: its arithmetic per token. The larger counts.
    wave_host_s: per wave of a lease; expert_host_s: per expert of a wave; partial_host_s: per layer whose experts do
    not all come in one wave, which are summed separately; late_host_s: per expert after the first wave of such a layer.
    expert_s: reading one expert where it is computed; pair_s: its arithmetic per token. The larger counts.
    probe_host_s: evaluating one later router ahead.
    passes: a decode step is one native call for all layers if the slots permit it, so that `wave_host_s` and
    `expert_host_s` apply to prompts only; ask_host_s: Python's part of each request of such a token pass;
    account_host_s: of each layer that is accounted for before the request.
    has_device: arithmetic is queued, and the host waits for it once per layer, for the routing.
    device_pass: a decode step on a device takes the device pass; None: it goes through modules.
    """

    token_host_s: float = 0.0
    token_s: float = 0.0
    layer_host_s: float = 0.0
    dense_s: float = 0.0
    dense_token_s: float = 0.0
    wave_host_s: float = 0.0
    expert_host_s: float = 0.0
    partial_host_s: float = 0.0
    late_host_s: float = 0.0
    expert_s: float = 0.0
    pair_s: float = 0.0
    probe_host_s: float = 0.0
    has_token_passes: bool = False
    ask_host_s: float = 0.0
    account_host_s: float = 0.0
    has_device: bool = False
    device_pass: PassCosts | None = None

    def dense(self, num_tokens: int) -> float:
        return max(self.dense_s, num_tokens * self.dense_token_s)

    def experts(self, num_tokens: list[int]) -> float:
        """Seconds of a wave of experts.

        num_tokens: of each expert of a wave.
        """
        return sum(max(self.expert_s, tokens * self.pair_s) for tokens in num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskModel:
    """Reads of parts of records, several at once.

    latency_s: from the request to its first byte. bytes_per_s: of all reads together; stream_bytes_per_s: of one.
    check_bytes_per_s: the checksum of an expert's first read, on the reading thread. num_readers: reads at once.
    """

    bytes_per_s: float
    stream_bytes_per_s: float = float("inf")
    latency_s: float = 100e-6
    check_bytes_per_s: float = float("inf")
    num_readers: int = 4
    part_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkModel:
    """Copies to the device, one after another. latency_s: per copy, the loader thread's part in it included."""

    bytes_per_s: float
    latency_s: float = 30e-6
    num_loaders: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LookaheadModel:
    """The assumed quality of the lookahead.

    recall: the share of a layer's experts that is predicted one, two ... MoE layers ahead; empty: no prefetch.
    """

    recall: tuple[float, ...] = ()
    seed: int = 0
