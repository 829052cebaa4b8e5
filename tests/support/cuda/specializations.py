"""The kernels that models of the supported families need: what `scripts/cuda_compile` compiles."""

from collections.abc import Iterator
from dataclasses import dataclass

from support.cuda import shim

ROWS = (1, 2, 4, 8)
ARCHITECTURES = (75, 80, 86, 89, 90, 120)
INCLUDES = ("kernels.cuh", "attention.cuh")
RESIDENCY = "residency.cuh"  # its kernels have no sizes
Kernel = tuple[str, ...]  # the kind and sizes of an OM_DEFINE_... line


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of a model; `latent` replaces grouped-query attention: unrotated, rotated, value dims and rank.

    router: experts, chosen, groups, chosen groups, best of a group, scoring, shares of the chosen. rotated: dims of a
    head; None: all. delta: of other layers, whose attention is linear: heads of keys, heads of values for each, their
    dims, and taps.
    """

    hidden: int
    inner: int
    codecs: tuple[str, ...] = ("NF4", "INT8")
    activation: str = "SILU"
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    norm: str = "NO_NORM"
    latent: tuple[int, int, int, int] | None = None
    mlps: tuple[int, ...] = ()  # widths of shared experts and dense layers
    router: tuple[int, ...]
    are_scaled: bool = False  # inputs of experts
    rotation: str = "HALVES"
    types: tuple[str, ...] = ()  # of GGUF files
    rotated: int | None = None
    delta: tuple[int, ...] | None = None


MODELS = {
    "Qwen3-30B-A3B": Model(
        hidden=2048,
        inner=768,
        heads=32,
        kv_heads=4,
        head_dim=128,
        norm="NORM_OF_HEAD",
        router=(128, 8, 1, 1, 1, 0, 1),
        types=("Q4_K", "Q6_K", "Q8_0", "GGUF_MXFP4"),
    ),
    "OLMoE-1B-7B": Model(
        hidden=2048, inner=1024, heads=16, kv_heads=16, head_dim=128, norm="NORM_OF_ALL", router=(64, 8, 1, 1, 1, 0, 0)
    ),
    "DeepSeek-V2-Lite": Model(
        hidden=2048,
        inner=1408,
        heads=16,
        latent=(128, 64, 128, 512),
        mlps=(2816, 10944),
        router=(64, 6, 1, 1, 1, 0, 0),
    ),
    "gpt-oss-20b": Model(
        hidden=2880,
        inner=2880,
        codecs=("MXFP4", "NF4", "INT8"),
        activation="GPT_OSS",
        heads=64,
        kv_heads=8,
        head_dim=64,
        router=(32, 4, 1, 1, 1, 0, 1),
    ),
    "Mixtral-8x7B": Model(
        hidden=4096,
        inner=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        router=(8, 2, 1, 1, 1, 0, 1),
        types=("Q4_K", "Q6_K"),
    ),
    "DeepSeek-V3": Model(
        hidden=7168,
        inner=2048,
        heads=128,
        latent=(128, 64, 128, 512),
        mlps=(2048, 18432),
        router=(256, 8, 8, 4, 2, 1, 1),
    ),
    "Llama-4-Scout": Model(
        hidden=5120,
        inner=8192,
        heads=40,
        kv_heads=8,
        head_dim=128,
        norm="NORM_OF_ROTATED",
        mlps=(8192,),
        router=(16, 1, 1, 1, 1, 1, 0),
        are_scaled=True,
        rotation="PAIRS",
    ),
    "Qwen3-Next-80B-A3B": Model(
        hidden=2048,
        inner=512,
        heads=16,
        kv_heads=2,
        head_dim=256,
        norm="NORM_OF_HEAD",
        mlps=(512,),
        router=(512, 10, 1, 1, 1, 0, 1),
        rotated=64,
        delta=(16, 2, 128, 128, 4),
    ),
    "Phi-3.5-MoE": Model(hidden=4096, inner=6400, heads=32, kv_heads=8, head_dim=128, router=(16, 2, 1, 1, 1, 2, 0)),
}


def kernels(model: Model, rows: int) -> Iterator[Kernel]:
    """Definitions for one number of rows, those that do not depend on it for one row only."""
    hidden, inner, activation = model.hidden, model.inner, f"OM_{model.activation}"
    for codec in (*model.codecs, *model.types):
        yield _line("FIRST", f"OM_{codec}", hidden, inner, rows, activation, 1)
        yield _line("SECOND", f"OM_{codec}", inner, hidden, rows)
    for codec in ("NF4", "INT8"):
        for width in model.mlps:
            yield _line("MLP_FIRST", f"OM_{codec}", f"OM_{codec}", hidden, width, rows, activation)
            yield _line("MLP_SECOND", f"OM_{codec}", width, hidden, rows)
        for columns in sorted({hidden, out_columns(model)}):
            yield _line("LINEAR", f"OM_{codec}", columns, rows)
    for codec in model.types:
        for columns in sorted({hidden, out_columns(model)}):
            yield _line("LINEAR", f"OM_{codec}", columns, rows)
    for width in model.mlps:
        yield _line("VALUES_FIRST", "OM_BF16", hidden, width, rows, activation)
        yield _line("VALUES_SECOND", "OM_BF16", width, hidden, rows)
    yield _line("VALUES", "OM_BF16", hidden, rows)
    yield _line("VALUES", "OM_FP32", hidden, rows)
    if rows > 1:
        return
    yield _line("NORM", hidden)
    yield _line("QUANTIZE", out_columns(model))
    if model.are_scaled:
        yield _line("SCALE", hidden)
    for codec in ("BF16", *(kind for kind in model.types if kind != "GGUF_MXFP4")):
        yield _line("EMBED", f"OM_{codec}", hidden)
    yield ("GREATEST",)
    yield ("CHOOSE",)


def out_columns(model: Model) -> int:
    """Columns of the attention's output projection."""
    return model.heads * (model.latent[2] if model.latent else model.head_dim)


def attention(model: Model, rows: int) -> Iterator[Kernel]:
    """Attention and router, likewise."""
    if model.latent:
        unrotated, rotated, value, rank = model.latent
        sizes = (model.heads, unrotated, rotated, value, rank)
        yield _line("ABSORB", "OM_BF16", *sizes, "OM_PAIRS_TO_HALVES", rows)
        yield _line("EXPAND", "OM_BF16", model.heads, unrotated, value, rank, rows)
    if rows > 1:
        return
    if model.latent:
        yield _line("ATTEND", model.heads, 1, rank, rotated, rank)
    else:
        heads = (model.heads, model.kv_heads, model.head_dim)
        rotated = model.head_dim if model.rotated is None else model.rotated
        yield _line("HEADS", *heads, rotated, f"OM_{model.rotation}", f"OM_{model.norm}")
        yield _line("ATTEND", *heads, 0, model.head_dim)
        yield _line("MERGE", model.heads, model.head_dim)
    if model.delta:
        yield _line("DELTA", *model.delta)
    yield _line("ROUTE", *model.router)


def program(lines: list[Kernel], includes: tuple[str, ...] = INCLUDES) -> tuple[str, dict[str, Kernel]]:
    """The text that defines these kernels, and what each one's name stands for."""
    names = {f"om_{line[0].lower()}_{number}": line for number, line in enumerate(lines)}
    text = [f'#include "{name}"' for name in includes]
    text += [f"OM_DEFINE_{line[0]}({', '.join([name, *line[1:]])})" for name, line in names.items()]
    return "\n".join([*text, ""]), names


def _line(kind: str, *sizes: int | str) -> Kernel:
    return (kind, *map(str, sizes))


def residency() -> tuple[str, dict[str, Kernel]]:
    """The program of the kernels that are there as they are."""
    text = f'#include "{RESIDENCY}"\n'
    return text, {name: (name,) for name in shim.kernel_names((shim.KERNELS / RESIDENCY).read_text())}


def rows_of(kernel: Kernel | list[str]) -> int:
    """The rows that a kernel was compiled for; 1 where it has no number of them."""
    at = {"FIRST": 4, "SECOND": 4, "MLP_FIRST": 5, "MLP_SECOND": 4, "VALUES_FIRST": 4, "VALUES_SECOND": 4}
    at |= {"LINEAR": 3, "VALUES": 3, "ABSORB": 8, "EXPAND": 6}
    return int(kernel[at[kernel[0]]]) if kernel[0] in at else 1
