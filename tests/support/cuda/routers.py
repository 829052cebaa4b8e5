"""Routers: the card's kernel in the shim, and the native library's.

A router of one input column whose activation is 1 has its weights as logits, whatever numbers they are.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offload_moe.native import kernels
from tests.support.cuda import shim
from tests.support.cuda.attention import Pass, load
from tests.support.cuda.bits import Floats, address
from tests.support.cuda.pages import STRUCTS

THREADS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Settings of a kernel, as in `RouterSpec`."""

    num_experts: int
    top_k: int
    is_sigmoid: bool = False
    jitter: float = 0.0  # of a sparse mixer
    is_of_chosen: bool = True
    num_groups: int = 1
    num_chosen_groups: int = 1
    num_best: int = 2

    @property
    def name(self) -> str:
        return f"om_route_{self.num_experts}_{self.top_k}_{self._settings.replace(', ', '_')}"

    @property
    def _settings(self) -> str:
        groups = f"{self.num_groups}, {self.num_chosen_groups}, {self.num_best}"
        scoring = 2 if self.jitter else int(self.is_sigmoid)
        return f"{groups}, {scoring}, {int(self.is_of_chosen)}"

    @property
    def line(self) -> str:
        return f"OM_DEFINE_ROUTE({self.name}, {self.num_experts}, {self.top_k}, {self._settings})"


def program(routers: list[Router]) -> shim.ShimLibrary:
    return load("attention.cuh", [router.line for router in routers])


Routed = tuple[NDArray[np.int32], Floats]


def route(
    library: shim.ShimLibrary,
    router: Router,
    logits: Floats,
    correction: Floats | None,
    scale: float,
    *,
    seed: int = 0,
    is_stopped: bool = False,
) -> Routed:
    """logits ``[T, E]`` -> ids and weights ``[T, K]``, by the card's kernel, compiled for 8 rows."""
    num_rows = len(logits)
    given = Pass(num_rows, is_stopped=is_stopped)
    ids, weights = np.full((8, router.top_k), -1, np.int32), np.full((8, router.top_k), np.nan, np.float32)
    params = STRUCTS["om_card_route_params"](
        **{"pass": given.struct, "logits": address(logits), "correction": address(correction), "scale": scale},
        jitter=router.jitter,
        ids=address(ids),
        weights=address(weights),
    )
    library.launch(router.name, (8,), (THREADS,), params, seed=seed)
    assert (ids[num_rows:] == -1).all()
    return ids[:num_rows], weights[:num_rows]


def expected(router: Router, logits: Floats, correction: Floats | None, scale: float) -> Routed:
    """The same by the native library."""
    rows = [_expected_row(router, row, correction, scale) for row in logits]
    return np.stack([ids for ids, _ in rows]), np.stack([weights for _, weights in rows])


def _expected_row(router: Router, logits: Floats, correction: Floats | None, scale: float) -> Routed:
    kernel = kernels.RouterKernel(
        kernels.Linear.of_numbers(torch.from_numpy(logits.copy())[:, None]),
        top_k=router.top_k,
        is_of_chosen=router.is_of_chosen,
        is_sigmoid=router.is_sigmoid,
        correction=None if correction is None else torch.from_numpy(correction),
        num_groups=router.num_groups,
        num_chosen_groups=router.num_chosen_groups,
        num_best=router.num_best,
        jitter=router.jitter or None,
        scale=scale,
    )
    ids, weights = torch.empty(router.top_k, dtype=torch.int64), torch.empty(router.top_k)
    kernel.step(torch.ones(1), torch.empty(router.num_experts), weights, ids)
    return ids.numpy().astype(np.int32), weights.numpy()
