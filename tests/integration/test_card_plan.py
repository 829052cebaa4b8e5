"""What `plan` counts of the device pass, against the pass itself on the fake driver."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.card_model import LINEAR_ATTENTION, CardModel, card_model
from support.cuda import fake, shim
from support.plan import tiny_shape
from support.tiny_models import tiny_model
from torch import Tensor

from offload_moe.card.device import CardDevice
from offload_moe.card.memory import allocator
from offload_moe.card.steps import CardSteps
from offload_moe.convert.quantize import quantize
from offload_moe.plan.card_pass import PassShape

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

FAMILIES: dict[str, dict[str, object]] = {
    "qwen3_moe": {},
    "deepseek_v3": {"qk_rope_head_dim": 16},  # latents, a dense layer, a shared expert
    "llama4_text": {  # inputs that are scaled, a shared expert
        "head_dim": 16,
        "moe_layers": [0, 1, 2],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size_mlp": 64,
    },
    "qwen3_next": LINEAR_ATTENTION,
}


def made_with(model: CardModel, num_layers: int) -> tuple[int, int]:
    """Nodes of the graphs of the first layers for one row, and the bytes that they allocate."""
    taken: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        taken.append(num_bytes)
        return allocator(torch.device("cpu"))(num_bytes)

    device = CardDevice.open(model.driver.path, fake.nvrtc(), cubins=shim.CACHE / "cubins")
    shared, parts = model.card.tables.shared(model.card.rooms, device.num_processors), model.card.parts
    steps = CardSteps(
        replace(parts, layers=parts.layers[:num_layers]),
        replace(shared, seen=shared.seen[:num_layers], experts=shared.experts[:num_layers]),
        device.session,
        device.compiler.image,
        allocate,
        1,
    )
    steps.close()
    device.session.close()
    return steps.num_nodes, sum(taken)


def planned(family: str, num_layers: int) -> PassShape:
    shape = tiny_shape(family, **FAMILIES[family] | {"num_hidden_layers": num_layers})
    assert isinstance(shape.device_pass, PassShape)
    return shape.device_pass


@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in list(FAMILIES)[1:])]
)
def test_launches_and_buffers_are_those_of_the_pass(family: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / family
    tiny_model(family, **FAMILIES[family]).to(torch.bfloat16).save_pretrained(checkpoint)
    store = quantize(checkpoint, tmp_path / "store", codec="nf4")
    with fake.FakeDriver() as driver, card_model(store, driver, 24, 24) as model:
        driver.set(no_kernels=1)
        (fewer, _), (more, num_bytes) = made_with(model, 2), made_with(model, 3)
    two, three = planned(family, 2), planned(family, 3)
    assert three.queued_nodes - two.queued_nodes == more - fewer
    assert 0 <= more - three.queued_nodes < 12  # beside the layers
    assert num_bytes < three.row_bytes + three.log_bytes + three.kept_bytes < 4 * num_bytes
