"""What was put aside while recording becomes the right arrays; routers' outputs become probabilities."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offload_moe.experts.attach import SpannedLayers
from offload_moe.profile.columns import Forward, make_trace, to_columns
from offload_moe.profile.routers import Router, find_router

ENDED = (5.0, 3, 0.75, 0.75, 40, 20)


def forward(tokens: list[int], start: int, *, is_new: bool) -> Forward:
    """Two layers, top-2 of 4, two tiers. A mark: seconds, useful, stall of vram and ram, bytes of vram and ram."""
    made = Forward(input_ids=torch.tensor([tokens]), start=start, is_new=is_new, num_tiers=2, num_layers=2)
    weights = torch.full((len(tokens), 2), 0.5, dtype=torch.bfloat16)
    made.began = (1.0, 0, 0.0, 0.0, 0, 0)
    made.calls = [
        (0, torch.tensor([[0, 3]] * len(tokens)), weights, (2.0, 0, 0.0, 0.0, 10, 0)),
        (1, torch.tensor([[2, 1]] * len(tokens)), weights, (4.0, 1, 0.5, 0.7, 10, 20)),
    ]
    made.ends = [(3.0, 1, 0.5, 0.7, 10, 20), (4.5, 3, 0.75, 0.75, 30, 20)]
    made.outcomes = [[(0, [], [3]), (1, [1], [])], [(0, [], [3])]]
    made.prefetches = [[(1, 2), (1, 1)], []]
    return made


def columns(*forwards: Forward, routers: list[Router | None] | None = None) -> dict[str, Any]:
    return to_columns([made.pack(ENDED, 4) for made in forwards], routers or [None, None], 4)


class TestColumns:
    def test_outcomes_are_those_of_the_expert(self) -> None:
        found = columns(forward([7, 8], 0, is_new=True))["outcomes"]
        assert found[0].tolist() == [[[0, 0], [2, 2]], [[0, 0], [1, 0]]]  # [layer][place][tier]
        assert found[1].tolist() == found[0].tolist()

    def test_a_second_of_stall_belongs_to_the_slowest_tier_that_was_waited_for(self) -> None:
        found = columns(forward([7], 0, is_new=True))["stall_s"]
        assert found[0, 0].tolist() == [0.0, 0.5]  # loaders waited 0.7 s for the disk, compute only 0.5
        np.testing.assert_allclose(found[0, 1], [0.2, 0.05])

    def test_compute_is_what_is_left_of_the_layer(self) -> None:
        np.testing.assert_allclose(columns(forward([7], 0, is_new=True))["compute_s"], [[0.5, 0.25]])

    def test_bytes_are_counted_from_one_layer_to_the_next(self) -> None:
        found = columns(forward([7], 0, is_new=True))["loaded_bytes"]
        assert found.tolist() == [[[10, 20], [30, 0]]]

    def test_prefetches(self) -> None:
        found = columns(forward([7], 0, is_new=True))
        assert found["prefetch_issued"].tolist() == [[[0, 0], [3, 0]]]
        assert found["prefetch_useful"].tolist() == [[[1, 0], [2, 0]]]
        assert found["forward_s"].tolist() == [4.0]

    def test_sequences_are_put_together(self) -> None:
        chunks = [
            columns(forward([7, 8, 9], 0, is_new=True), forward([5], 3, is_new=False)),
            columns(forward([6], 4, is_new=False), forward([1, 2], 0, is_new=True)),
        ]
        trace = make_trace(chunks, num_experts=[4, 4], tiers=("vram", "ram"), metadata="{}")
        assert trace.sequence_lengths.tolist() == [5, 2]
        assert trace.forwards is not None
        assert trace.forwards.tolist() == [0, 0, 0, 1, 2, 3, 3]
        assert trace.is_prompt is not None
        assert trace.is_prompt.tolist() == [True] * 3 + [False] * 2 + [True] * 2
        assert trace.token_ids is not None
        assert trace.token_ids.tolist() == [7, 8, 9, 5, 6, 1, 2]
        assert trace.router_probabilities is None
        assert trace.weights is not None
        assert trace.weights.dtype == np.float16

    def test_a_trace_cut_into_begins_a_sequence(self) -> None:
        trace = make_trace(
            [columns(forward([6], 4, is_new=False))], num_experts=[4, 4], tiers=("a", "b"), metadata="{}"
        )
        assert trace.sequence_lengths.tolist() == [1]

    @pytest.mark.parametrize("layers", [[0], [0, 0], [1, 0]])
    def test_forwards_that_are_not_one_pass(self, layers: list[int]) -> None:
        made = forward([7], 0, is_new=True)
        assert made.is_complete()
        made.calls = [(layer, *call[1:]) for layer, call in zip(layers, made.calls, strict=False)]
        assert not made.is_complete()

    def test_layers_that_saw_other_tokens(self) -> None:
        made = forward([7, 8], 0, is_new=True)
        made.calls[1] = (1, torch.zeros(3, 2), *made.calls[1][2:])
        assert not made.is_complete()


class TestRouters:
    LOGITS = torch.tensor([[1.0, 2.0, 3.0, 0.0]])

    def router(self, *, is_sigmoid: bool = False) -> Router:
        return Router(module=nn.Identity(), num_experts=4, is_sigmoid=is_sigmoid)

    def test_logits(self) -> None:
        found = self.router().scores((torch.tensor([[2, 1]]), self.LOGITS), 1)
        assert found is not None
        torch.testing.assert_close(self.router().probabilities(found), self.LOGITS.softmax(-1))

    def test_sigmoid_scores_are_normalized(self) -> None:
        found = self.router(is_sigmoid=True).probabilities(self.LOGITS)
        torch.testing.assert_close(found, self.LOGITS.sigmoid() / self.LOGITS.sigmoid().sum())

    def test_probabilities_stay(self) -> None:
        ready = self.LOGITS.softmax(-1)
        torch.testing.assert_close(self.router().probabilities(ready), ready)

    def test_scores_with_a_batch_dimension(self) -> None:
        found = self.router().scores(self.LOGITS.repeat(3, 1)[None], 3)
        assert found is not None
        assert found.shape == (3, 4)

    @pytest.mark.parametrize("out", [None, (torch.ones(1, 4, dtype=torch.long),), torch.ones(1, 2), torch.ones(4, 1)])
    def test_no_scores(self, out: Any) -> None:
        assert self.router().scores(out, 1) is None

    def test_layers_with_fewer_experts_are_padded(self) -> None:
        made = forward([7], 0, is_new=True)
        made.scores = {0: self.LOGITS, 1: self.LOGITS[:, :2]}
        small = Router(module=nn.Identity(), num_experts=2, is_sigmoid=False)
        found = columns(made, routers=[self.router(), small])["router_probabilities"]
        assert found.shape == (1, 2, 4)
        np.testing.assert_allclose(found.sum(-1), 1, atol=2e-3)
        assert found[0, 1, 2:].tolist() == [0, 0]

    def test_one_layer_without_scores_leaves_them_out(self) -> None:
        made = forward([7], 0, is_new=True)
        made.scores = {0: self.LOGITS, 1: None}
        assert columns(made, routers=[self.router(), None])["router_probabilities"] is None

    def test_a_family_without_a_router_module(self) -> None:
        model = nn.ModuleDict({"block": nn.ModuleDict({"experts": nn.Identity()})})
        assert find_router(model, "block", 4) is None


class TestRuns:
    @staticmethod
    def layers(first_layer: int, num_layers: int) -> SpannedLayers:
        every = slice(first_layer, first_layer + num_layers)
        return SpannedLayers(
            first_layer=first_layer,
            logits=torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])[every],
            weights=torch.full((num_layers, 2), 0.5),
            ids=torch.tensor([[0, 3], [2, 1]])[every],
            times=torch.tensor([[2.0, 3.0], [4.0, 4.5]], dtype=torch.float64)[every],
            stalls=torch.tensor([0.0, 0.25], dtype=torch.float64)[every],
            num_useful=[0, 1, 3][first_layer : first_layer + num_layers + 1],
            disk_bytes=[10, 20, 35][first_layer : first_layer + num_layers + 1],
        )

    def test_a_run_is_its_layers(self) -> None:
        """Done at once, or in two parts, or layer by layer: the same arrays."""
        found = []
        for parts in ([(0, 2, 0.75)], [(0, 1, 0.5), (1, 1, 0.75)]):
            made = Forward(input_ids=torch.tensor([[7]]), start=3, is_new=False, num_tiers=1, num_layers=2)
            made.began = (1.0, 0, 0.5, 10)
            for first_layer, num_layers, stalled in parts:
                made.add_span(self.layers(first_layer, num_layers), (9.0, 3, stalled, 35))
            assert made.is_complete()
            routers = [Router(module=nn.Identity(), num_experts=4, is_sigmoid=False)] * 2
            found.append(to_columns([made.pack((5.0, 3, 0.75, 40), 4)], routers, 4))
        at_once, apart = found
        for name, values in at_once.items():
            assert np.array_equal(values, apart[name]), name
        assert at_once["experts"].tolist() == [[[0, 3], [2, 1]]]
        assert at_once["prefetch_useful"][0, :, 0].tolist() == [1, 2]
        assert at_once["stall_s"][0, :, 0].tolist() == [0, 0.25]
        assert at_once["compute_s"][0].tolist() == [1.0, 0.25]
        assert at_once["loaded_bytes"][0, :, 0].tolist() == [10, 20]
        assert at_once["router_probabilities"][0, 0].argmax() == 3

    def test_half_a_run_is_not_complete(self) -> None:
        made = Forward(input_ids=torch.tensor([[7]]), start=3, is_new=False, num_tiers=1, num_layers=2)
        made.add_span(self.layers(0, 1), (9.0, 3, 0.5, 20))
        assert not made.is_complete()
