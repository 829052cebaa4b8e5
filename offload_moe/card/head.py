"""The launches behind the last layer: norm, output head, and the choice of the next tokens.

T rows, R rows that kernels are compiled for, V vocabulary, H hidden.
"""

from offload_moe.card.frame import Added, Frame
from offload_moe.card.launches import launch
from offload_moe.card.linears import add_linears, codecs_of, out_features
from offload_moe.card.nodes import Nodes
from offload_moe.card.norms import Norm
from offload_moe.card.structs import struct
from offload_moe.native.constants import GIVES_HIDDEN, GIVES_LOGITS, GIVES_TOKENS
from offload_moe.native.kernels import Linear

GIVEN = (GIVES_HIDDEN, GIVES_LOGITS, GIVES_TOKENS)
HIDDEN, LOGITS = "hidden out", "next logits"  # buffers: fp32 ``[R, H]`` and ``[R, V]``


def add_end(nodes: Nodes, frame: Frame, norm: Norm, head: Linear | None, added: Added, *, gives: int) -> None:
    """The end of a pass that gives one of `GIVEN`."""
    has_head = head is not None and gives != GIVES_HIDDEN
    codecs = codecs_of([head]) if head is not None and has_head else set()
    inputs, hidden = frame.inputs("last", codecs, frame.hidden), frame.floats(HIDDEN, frame.hidden)
    frame.add_norm(nodes, norm=norm, added=added, inputs=inputs, normed=hidden)
    if head is not None and has_head:
        logits = frame.floats(LOGITS, out_features(head))
        add_linears(
            nodes,
            frame.program,
            frame.keeper,
            [(head, logits)],
            state=frame.base,
            inputs=inputs,
            x=hidden,
            rows=frame.rows,
        )
        if gives == GIVES_TOKENS:
            add_choice(nodes, frame, out_features(head))
    params = struct("finish_params")(**{"pass": frame.base}, state=frame.state, notice=frame.notice)
    nodes.add("om_finish", params, threads=launch("OM_FINISH_THREADS"), grid=(1,))


def add_choice(nodes: Nodes, frame: Frame, num_tokens: int) -> None:
    """The next token of each row, out of its logits. num_tokens: V."""
    num_parts = launch("OM_GREATEST_BLOCKS", num_tokens)
    params = struct("choose_params")(
        **{"pass": frame.base},
        logits=frame.floats(LOGITS, num_tokens),
        greatest=frame.scratch.addresses("greatest", frame.rows * num_parts),
        sampling=frame.draws,
        positions=frame.positions,
        tokens=frame.tokens,
        num_tokens=num_tokens,
    )
    nodes.add(
        frame.program.kernel("GREATEST"), params, threads=launch("OM_GREATEST_THREADS"), grid=(num_parts, frame.rows)
    )
    nodes.add(frame.program.kernel("CHOOSE"), params, threads=launch("OM_CHOOSE_THREADS"), grid=(frame.rows,))
