"""`LoadOptions`: what `load` takes, checked before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

import torch

from offload_moe.convert.quantize import get_dense_codec
from offload_moe.errors import ConfigError
from offload_moe.experts.hybrid import HYBRID_CHOICES, Hybrid
from offload_moe.experts.lookahead import DEFAULT_DEPTH
from offload_moe.plan.machine import compute_dtype
from offload_moe.plan.plan import check_context
from offload_moe.quant import get_codec
from offload_moe.residency.policy import DEFAULT_POLICY, check_policy
from offload_moe.speculate.choice import Choice, check_choice
from offload_moe.system.names import choice
from offload_moe.system.sizes import parse_size

DevicePassChoice = Literal["auto", "off"]
DEVICE_PASS_CHOICES: tuple[DevicePassChoice, ...] = ("auto", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded; every option has a default.

    A checkpoint is converted to a store in the user's cache folder first, once. `codec` and `dense_codec` are for that
    conversion; a store keeps its own. codec: None takes mxfp4 for a checkpoint in MXFP4 and nf4 for any other.

    dense_codec: None keeps dense weights in bf16 on disk, and in memory takes what fits: bf16 or int8 on a device, int8
    on the CPU (bf16 where `codec` or the store is bf16 throughout or `exact` is set), nf4 only where nothing else fits.
    "bf16" keeps them as they are everywhere.
    vram, ram: sizes such as ``"10GiB"``, or bytes, that the process may use; None takes 90% of what is free.
    context: tokens of prompt and answer that memory is reserved for; None takes what fits, 8,192 at most.
    policy: which experts stay resident, one of `offload_moe.residency.policy.policy_names()`.
    device: None takes the accelerator when there is one. dtype: "fp32", "bf16" or "fp16"; None takes bf16 on a device
    that has it, fp16 on an older one, fp32 on the CPU.
    exact: CPU kernels keep activations in full precision, slower. A bf16 store gives eager's bits with it, and in fp32.
    fast_path: decode steps through `offload_moe.decode`; False takes the model's own code.
    device_pass: "auto" takes decode steps on an NVIDIA card through `offload_moe.card` where its kernels allow it;
    "off": through bitsandbytes, as prompts.
    hybrid: with a device, whether the CPU computes some of the misses while others are copied: "auto" where kernels and
    codec allow it, "on" or an error, "off" for results that never depend on where an expert was.
    prefetch: MoE layers to look ahead; 0 turns prefetch and warm starts off. It also turns itself off while it does not
    pay.
    speculate: which tokens are guessed, so that one pass computes several; it changes the speed and no token. "auto" is
    "ngram", what followed the same text before, and "mtp" where the store has it and it fits, while they pay; "mtp" is
    the checkpoint's own layer for multi-token prediction; "draft" takes the guesses of the model `draft`, a checkpoint
    folder or hub id of the same vocabulary, which has memory of its own; "off" guesses none.
    revision, token: of a hub id. follow_links: see `quantize`.

    Raises:
        ConfigError: a value is not usable.
    """

    vram: str | int | None = None
    ram: str | int | None = None
    context: int | None = None
    codec: str | None = None
    dense_codec: str | None = None
    policy: str = DEFAULT_POLICY
    device: str | None = None
    dtype: str | torch.dtype | None = None
    exact: bool = False
    prefetch: int = DEFAULT_DEPTH
    hybrid: Hybrid = "auto"
    fast_path: bool = True
    speculate: Choice = "auto"
    draft: str | Path | None = None
    device_pass: DevicePassChoice = "auto"
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    follow_links: bool = False

    def __post_init__(self) -> None:
        for size in (self.vram, self.ram):
            _bytes(size)
        check_context(self.context)
        check_policy(self.policy)
        choice("hybrid mode", self.hybrid, HYBRID_CHOICES)
        check_choice(self.speculate)
        if (self.speculate == "draft") != (self.draft is not None):
            raise ConfigError('speculate="draft" and draft, the model that guesses, come together.')
        choice("device pass", self.device_pass, DEVICE_PASS_CHOICES)
        if self.codec is not None:
            get_codec(self.codec)
        if self.dense_codec is not None:
            get_dense_codec(self.dense_codec)
        compute_dtype(self.dtype, torch.device("cpu"))
        if not isinstance(self.prefetch, int) or self.prefetch < 0:
            raise ConfigError(
                f"A prefetch of {self.prefetch!r} layers is not usable. It must be a whole number from 0."
            )

    @property
    def vram_bytes(self) -> int | None:
        return _bytes(self.vram)

    @property
    def ram_bytes(self) -> int | None:
        return _bytes(self.ram)

    def updated(self, keywords: Mapping[str, Any]) -> Self:
        """These options with some of them replaced.

        Raises:
            ConfigError: one is unknown or not usable.
        """
        known = [option.name for option in fields(self)]
        for name in keywords:
            choice("option", name, known)
        return replace(self, **keywords)


class LoadKeywords(TypedDict, total=False):
    """The fields of `LoadOptions`, as keywords of `load`."""

    vram: str | int | None
    ram: str | int | None
    context: int | None
    codec: str | None
    dense_codec: str | None
    policy: str
    device: str | None
    dtype: str | torch.dtype | None
    exact: bool
    prefetch: int
    hybrid: Hybrid
    fast_path: bool
    speculate: Choice
    draft: str | Path | None
    device_pass: DevicePassChoice
    revision: str | None
    token: str | None
    follow_links: bool


def _bytes(size: str | int | None) -> int | None:
    return None if size is None else parse_size(size)
