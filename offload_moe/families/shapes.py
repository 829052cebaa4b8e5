"""Expert shapes that several families share."""

from offload_moe.quant import layout
from offload_moe.quant.layout import ExpertShape, Matrix

GATED = layout.GATED
PLAIN = "up_proj"
DOWN = "down_proj"


def gated_shape(hidden_size: int, intermediate_size: int, *, is_transposed: bool = False) -> ExpertShape:
    """Gate rows above up rows, then down; no biases."""
    return ExpertShape(
        matrices=(
            Matrix(name=GATED, out_features=2 * intermediate_size, in_features=hidden_size),
            Matrix(name=DOWN, out_features=hidden_size, in_features=intermediate_size),
        ),
        is_transposed=is_transposed,
    )


def plain_shape(hidden_size: int, intermediate_size: int, *, has_bias: bool) -> ExpertShape:
    """Up, an activation, down."""
    biases = ((f"{PLAIN}_bias", intermediate_size), (f"{DOWN}_bias", hidden_size)) if has_bias else ()
    return ExpertShape(
        matrices=(
            Matrix(name=PLAIN, out_features=intermediate_size, in_features=hidden_size),
            Matrix(name=DOWN, out_features=hidden_size, in_features=intermediate_size),
        ),
        biases=biases,
    )
