"""Whether bitsandbytes' kernels, which compute experts on the device, run there with right results."""

import torch

from offload_moe.doctor.check import Check, judge
from offload_moe.native.device import record_linear
from offload_moe.quant import ExpertShape, Matrix, get_codec

NAME = "device kernels"
FEATURES = 256
SHAPE = ExpertShape(matrices=(Matrix(name="weight", out_features=FEATURES, in_features=FEATURES),))
NUM_TOKENS = (1, 32)  # a decode step and a prompt use different kernels
ALLOWED_ERROR = 0.02  # of the largest number; 16-bit sums
REINSTALL = 'python -m pip install --force-reinstall --no-deps "bitsandbytes>=0.50,<0.51"'


def check_device_kernels(device: torch.device, dtype: torch.dtype) -> Check:
    """An nf4 matrix times one token and times several, against the decoded matrix on the CPU."""
    codec = get_codec("nf4")
    generator = torch.Generator().manual_seed(0)
    record = codec.encode(SHAPE, {"weight": torch.randn(FEATURES, FEATURES, generator=generator)})
    weight = codec.decode(SHAPE, record, torch.float32)["weight"]
    error = 0.0
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, FEATURES, generator=generator).to(dtype)
        expected = x.float() @ weight.T
        try:
            found = record_linear(x.to(device), record.to(device), SHAPE, codec, "weight").float().cpu()
        except (RuntimeError, AttributeError, OSError) as failure:
            reason = " ".join(str(failure).split())[:200]
            return judge(
                NAME,
                f"failed: {type(failure).__name__}: {reason}",
                problem=f"bitsandbytes has no kernels for this card or torch. {REINSTALL}; until then --device cpu.",
            )
        error = max(error, float((found - expected).abs().max() / expected.abs().max()))
    found_text = f"bitsandbytes, nf4 in {str(dtype).removeprefix('torch.')}, off by {error:.1e} of the largest number"
    wrong = not error <= ALLOWED_ERROR
    fix = f"Answers would be wrong. {REINSTALL}; until then --device cpu." if wrong else ""
    return judge(NAME, found_text, problem=fix, numbers={"error": error})
