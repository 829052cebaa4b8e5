"""The ranking as one native call, on the arrays that the one in numpy has.

The same numbers, up to rounding and to which of equally near neighbours is taken.

A decode step's experts have just passed through the caches, and thirty calls of numpy are slow behind them.
"""

import ctypes
from array import array
from collections.abc import Sequence

from offload_moe.native import load_for_short_calls
from offload_moe.schedule.policy.history import NUM_NEIGHBOURS, SHARPNESS
from offload_moe.schedule.policy.ranking import Ranking
from offload_moe.schedule.policy.reuse import SHRINKAGE


def make_ranking(num_keys: int, discount: float) -> Ranking:
    """A native one where the library was built."""
    library = load_for_short_calls()
    return Ranking(num_keys, discount) if library is None else NativeRanking(library, num_keys, discount)


class NativeRanking(Ranking):
    """Another `rank`."""

    def __init__(self, library: ctypes.PyDLL, num_keys: int, discount: float) -> None:
        super().__init__(num_keys, discount)
        history, reuse = self.history, self.reuse
        arrays = {
            **{name: getattr(history, name) for name in ("used", "was_used", "future", "matched")},
            **{name: getattr(reuse, name) for name in ("features", "weights", "covariance", "evidence")},
            **{name: getattr(self, name) for name in ("worth", "order", "absent")},
        }
        self._struct = _RankingStruct(
            num_keys=num_keys,
            num_tokens=len(history.matched),
            num_neighbours=NUM_NEIGHBOURS,
            sharpness=SHARPNESS,
            shrinkage=SHRINKAGE,
            **{name: values.ctypes.data for name, values in arrays.items()},
        )
        self._passed = _PassedStruct()
        self._addresses = ctypes.addressof(self._struct), ctypes.addressof(self._passed)
        self._native = library.om_rank
        self._native.argtypes, self._native.restype = [ctypes.c_void_p] * 2, None

    def rank(
        self,
        keys: Sequence[int],
        shares: Sequence[float],
        first: int,
        end: int,
        num_layers: int,
        *,
        observes: bool,
        learns: bool,
        num_tokens: int,
    ) -> None:
        assert len(keys) == len(shares)
        used_keys, used_shares = array("i", keys), array("f", shares)
        passed = self._passed
        passed.keys, passed.num_keys = used_keys.buffer_info()
        passed.shares = used_shares.buffer_info()[0]
        passed.first, passed.end = first, end
        passed.decay = self.history.fade(len(keys), num_layers) if observes else 1.0
        passed.matchable = self.history.matchable
        passed.slow_step, passed.fast_step = self.reuse.steps(num_tokens)
        passed.discount = self.discount
        passed.observes, passed.learns = observes, learns and self.reuse.is_learning
        self._native(*self._addresses)


class _RankingStruct(ctypes.Structure):
    """`om_ranking`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_keys", "num_tokens", "num_neighbours")),
        *((name, ctypes.c_void_p) for name in ("used", "was_used", "future", "matched")),
        *((name, ctypes.c_void_p) for name in ("features", "weights", "covariance", "evidence")),
        *((name, ctypes.c_void_p) for name in ("worth", "order", "absent")),
        *((name, ctypes.c_float) for name in ("sharpness", "shrinkage")),
    )


class _PassedStruct(ctypes.Structure):
    """`om_passed`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "shares")),
        *((name, ctypes.c_int64) for name in ("num_keys", "first", "end")),
        *((name, ctypes.c_float) for name in ("decay", "matchable", "slow_step", "fast_step", "discount")),
        *((name, ctypes.c_int32) for name in ("observes", "learns")),
    )
