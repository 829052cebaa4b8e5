"""What attention is tried on: rows of sequences of all kinds, and numbers of all kinds."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tests.support.cuda import shim
from tests.support.cuda.attention import Grouped, Latent, Setting, case_of
from tests.support.cuda.pages import Sequence

Shape = Grouped | Latent
SETTINGS: Mapping[str, Setting] = {
    "the first token": Setting(sequences=(Sequence(length=0),)),
    "two sections": Setting(sequences=(Sequence(length=700),), has_biases=True),
    "rows of one sequence": Setting(sequences=(Sequence(length=509, num_rows=5),)),
    "several sequences": Setting(
        sequences=(Sequence(length=3), Sequence(length=1030, num_rows=3, base=77), Sequence(length=127, num_rows=4)),
    ),
    "one room": Setting(sequences=(Sequence(length=130, num_rows=2),), is_one_room=True, has_sinks=True),
    "a window": Setting(sequences=(Sequence(length=300, num_rows=3), Sequence(length=60)), window=128, has_sinks=True),
    "a window up to the end of a page": Setting(sequences=(Sequence(length=383),), window=100),
    "a window of sections": Setting(sequences=(Sequence(length=777, base=5),), window=600),
    "chunks": Setting(
        sequences=(Sequence(length=254, num_rows=4, base=700), Sequence(length=90), Sequence(length=383)), chunk=192
    ),
    "chunks of sections": Setting(sequences=(Sequence(length=1790, num_rows=3),), chunk=896, query_scale=(8.0, 0.1)),
    "scaled queries": Setting(
        sequences=(Sequence(length=2, num_rows=5), Sequence(length=40, base=8150)), query_scale=(3.0, 0.7)
    ),
    "a window of one": Setting(sequences=(Sequence(length=128, num_rows=2),), window=1),
}


def check(library: shim.ShimLibrary, shape: Shape, setting: str, *, num_blocks: int = 3, seed: int = 0) -> None:
    """The bits of the CPU. num_blocks: of the kernel of sections; seed: of the numbers, and of the order of threads."""
    case_of(shape, _fitting(shape, SETTINGS[setting]), seed).check(library, num_blocks=num_blocks, seed=seed)


def check_special_numbers(library: shim.ShimLibrary, shape: Shape) -> None:
    """NaN, infinite, subnormal and huge ones, of which some spoil a part of the results only."""
    setting = Setting(sequences=(Sequence(length=570, num_rows=2),), has_biases=True, has_sinks=True, num_special=2)
    shares = []
    for seed in range(4):
        out = case_of(shape, _fitting(shape, setting), seed).check(library, seed=seed)
        shares.append(float(np.isnan(out).mean()))
    assert min(shares) < 1


def check_stopped(library: shim.ShimLibrary, shape: Shape) -> None:
    """A stopped pass writes nothing."""
    case = case_of(shape, SETTINGS["rows of one sequence"])
    before = [plane.pool.copy() for planes in case.cache.planes for plane in planes]
    query, out, inputs, attended = case.run(library, is_stopped=True)
    after = [plane.pool for planes in case.cache.planes for plane in planes]
    assert all(np.isnan(values).all() for values in (query, out, attended.sections, attended.sums))
    assert all((quants == 99).all() for quants in inputs.quants)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def _fitting(shape: Shape, setting: Setting) -> Setting:
    return replace(setting, has_sinks=setting.has_sinks and isinstance(shape, Grouped))
