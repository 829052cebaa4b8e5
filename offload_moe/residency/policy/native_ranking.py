"""The ranking as one native call, on the arrays that the one in numpy has.

The same numbers, up to rounding and to which of equally near neighbours is taken.

A decode step's experts have just passed through the caches, and thirty calls of numpy are slow behind them.
"""

import ctypes
from array import array

from offload_moe.native.library import load_for_short_calls
from offload_moe.residency.policy.history import NUM_NEIGHBOURS, SHARPNESS
from offload_moe.residency.policy.ranking import Passed, Ranking
from offload_moe.residency.policy.reuse import SHRINKAGE


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
        self._given = _PassedStruct()
        self._addresses = ctypes.addressof(self._struct), ctypes.addressof(self._given)
        self._native = library.om_rank
        self._native.argtypes, self._native.restype = [ctypes.c_void_p] * 2, None

    def rank(self, passed: Passed) -> None:
        assert len(passed.keys) == len(passed.shares)
        keys, shares = array("i", passed.keys), array("f", passed.shares)
        given = self._given
        given.keys, given.num_keys = keys.buffer_info()
        given.shares = shares.buffer_info()[0]
        given.first, given.end = passed.first, passed.end
        given.decay = self.history.fade(len(keys), passed.num_layers) if passed.observes else 1.0
        given.matchable = self.history.matchable
        given.slow_step, given.fast_step = self.reuse.steps(passed.num_tokens)
        given.discount = self.discount
        given.observes, given.learns = passed.observes, passed.learns and self.reuse.is_learning
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
