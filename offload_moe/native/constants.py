"""Numbers that C and Python share. `abi.py` compares them with those of the library."""

CODECS = {"nf4": 0, "int8": 1, "mxfp4": 2, "bf16": 3, "fp32": 4}
GGUF_NUMBERS = {"fp16": 5}  # beside bf16 and fp32
GGUF_BLOCKS = {"q4_0": 6, "q4_1": 7, "q5_0": 8, "q5_1": 9, "q8_0": 10, "iq4_nl": 11, "gguf_mxfp4": 12}
GGUF_SUPERBLOCKS = {"q2_k": 13, "q3_k": 14, "q4_k": 15, "q5_k": 16, "q6_k": 17, "iq4_xs": 18}
FP32_VALUES, BF16_VALUES = 0, 1  # dtypes of activations
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "gpt_oss": 3, "relu": 4, "relu2": 5, "identity": 6}
ROTATIONS = {"halves": 0, "pairs_to_halves": 1, "pairs": 2}  # the dims that turn together, and their places afterwards
FREE, LOADING, RESIDENT, RESERVED, ARRIVED = 0, 1, 2, 3, 4  # states of a slot
READING, DONE, DROPPED, FAILED = 1, 2, 3, 4  # changes of a read
SHORT_READ, WRONG_CHECKSUM = -1, -2  # errors of a read that are no errno
HIT, ARRIVING, MISSING, FETCHED = 0, 1, 2, 3  # how an expert was found
NEEDS_EXPERTS, NEEDS_SLOTS = 1, 2  # what a layer of a token pass needs
UNDER_WAY = -2  # in place of a layer: no layer needs anything yet
GIVES_HIDDEN, GIVES_LOGITS, GIVES_TOKENS = 0, 1, 2  # what a pass of a card gives
DIM_STEP = 16  # dims, ranks and rotated dims are multiples of the widest vector
MAX_TOP_K = 64  # of the layers of a span
MAX_ROWS = 8  # tokens that a span takes at once
MAX_SCORED = 1024  # experts of a router that scores all of them
MAX_ROTATED = 256  # dims of latent attention
MAX_DELTA_DIM = 256  # of a head of a gated delta rule

_TABLES = (CODECS, GGUF_NUMBERS, GGUF_BLOCKS, GGUF_SUPERBLOCKS, ACTIVATIONS, ROTATIONS)
CONSTANTS = {
    **{f"OM_{name.upper()}": value for table in _TABLES for name, value in table.items()},
    "OM_F32": FP32_VALUES,
    "OM_BF16_VALUES": BF16_VALUES,
    "OM_SLOT_FREE": FREE,
    "OM_SLOT_LOADING": LOADING,
    "OM_SLOT_RESIDENT": RESIDENT,
    "OM_SLOT_RESERVED": RESERVED,
    "OM_SLOT_ARRIVED": ARRIVED,
    "OM_READING": READING,
    "OM_DONE": DONE,
    "OM_DROPPED": DROPPED,
    "OM_FAILED": FAILED,
    "OM_SHORT_READ": SHORT_READ,
    "OM_WRONG_CHECKSUM": WRONG_CHECKSUM,
    "OM_HIT": HIT,
    "OM_ARRIVING": ARRIVING,
    "OM_MISSING": MISSING,
    "OM_FETCHED": FETCHED,
    "OM_NEEDS_EXPERTS": NEEDS_EXPERTS,
    "OM_NEEDS_SLOTS": NEEDS_SLOTS,
    "OM_UNDER_WAY": UNDER_WAY,
    "OM_GIVES_HIDDEN": GIVES_HIDDEN,
    "OM_GIVES_LOGITS": GIVES_LOGITS,
    "OM_GIVES_TOKENS": GIVES_TOKENS,
    "OM_BLOCK": 64,  # `quant.layout.BLOCK`; an import would run before the library is looked for
    "OM_MAX_TOP_K": MAX_TOP_K,
    "OM_MAX_ROWS": MAX_ROWS,
    "OM_MAX_SCORED": MAX_SCORED,
    "OM_MAX_ROTATED": MAX_ROTATED,
    "OM_MAX_DELTA_DIM": MAX_DELTA_DIM,
}
