"""Records in panels on a device: copied to rows where prompts need rows."""

import pytest
import torch

from offload_moe.native.device import in_rows
from offload_moe.native.kernels import panel_order
from offload_moe.quant import ExpertShape, Matrix, get_codec
from offload_moe.quant.panels import from_panels, to_panels


@pytest.mark.parametrize(("rows", "count"), [(16, 4), (48, 3), (37, 5), (7, 2)])
def test_panels_and_back(rows: int, count: int) -> None:
    elements = torch.randint(0, 1 << 30, (rows, count), dtype=torch.int32)
    panels = to_panels(elements)
    assert torch.equal(from_panels(panels, rows), elements)
    assert rows < 16 or not torch.equal(panels.view(rows, count), elements)


EXPERT, WEIGHT = ("gate_up_proj", "down_proj"), ("weight",)
SIZES = {"gate_up_proj": (96, 64), "down_proj": (64, 48), "weight": (40, 128)}
SIZES_OF_256 = {"gate_up_proj": (512, 256), "down_proj": (40, 256), "weight": (40, 512)}


@pytest.mark.parametrize(
    ("codec_name", "names"),
    [
        *((codec, names) for codec in ("nf4", "int8", "mxfp4") for names in (EXPERT, WEIGHT)),
        ("gguf:Q4_K,Q4_K,Q6_K", EXPERT),
        ("gguf:MXFP4,Q8_0,Q8_0", EXPERT),
        ("gguf:Q6_K", WEIGHT),
    ],
)
def test_a_record_is_copied_to_the_rows_that_it_was_made_of(codec_name: str, names: tuple[str, ...]) -> None:
    codec = get_codec(codec_name)
    sizes = SIZES_OF_256 if codec_name.startswith("gguf") else SIZES
    shape = ExpertShape(
        matrices=tuple(Matrix(name=name, out_features=sizes[name][0], in_features=sizes[name][1]) for name in names)
    )
    record = torch.randint(0, 256, (codec.layout(shape).record_bytes,), dtype=torch.uint8)
    order = panel_order(codec_name, shape)
    assert order is not None
    panels = record.clone()
    order.to_panels(panels)
    before = panels.clone()
    assert not torch.equal(panels, record)
    assert torch.equal(in_rows(panels, shape, codec), record)
    assert torch.equal(panels, before)
