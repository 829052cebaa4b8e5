"""Dense linear layers whose weight stays in its codec's record."""

from collections import Counter
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from offload_moe.native import kernels
from offload_moe.native.device import record_linear
from offload_moe.quant import Codec, ExpertShape
from offload_moe.quant.gguf import GgufCodec
from offload_moe.quant.gguf_device import decode_anywhere
from offload_moe.quant.layout import weight_shape

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


class QuantLinear(nn.Module):
    """``y = x W^T + b`` on a record, with the native kernels on the CPU and bitsandbytes on the device.

    O out features, K in features. The record is a buffer, so it moves with the model; it is not a parameter, because
    its bytes are not numbers. It is in panels on the CPU where the kernel reads panels, and in rows elsewhere.
    """

    record: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        record: Tensor,
        shape: ExpertShape,
        codec: Codec,
        *,
        is_exact: bool = False,
        is_repacked: bool = False,
        keeps_panels: bool = False,
    ) -> None:
        """record: in rows; it is changed to panels where it lies. is_exact: it stays in rows, and activations in fp32.

        is_repacked: the record is in the order that this linear reads already. keeps_panels: it stays in panels on a
        device, for the device pass.
        shape: one matrix named `weight`, and a bias named `bias` where the record holds one. A layer whose bias is kept
        outside the record sets `bias` afterwards.
        """
        super().__init__()
        self.register_buffer("record", record, persistent=False)
        self.register_parameter("bias", None)
        self.in_features = shape.matrices[0].in_features
        self.out_features = shape.matrices[0].out_features
        self.shape = shape
        self.codec = codec
        self._keeps_panels = keeps_panels
        self._order: kernels.PanelOrder | None = None
        self._kernel: kernels.LinearKernel | None = None
        if kernels.unsupported_reason(codec.name, shape) is None and not (
            is_exact and kernels.not_in_rows_reason(codec.name)
        ):
            layout = codec.layout(shape)
            self._order = None if is_exact else kernels.panel_order(codec.name, shape)
            num_parts = int(self._order is not None)
            self._kernel = kernels.LinearKernel(codec.name, [shape], [layout], num_parts=num_parts)
        if self._order is not None and record.is_cpu and not is_repacked:
            self._order.to_panels(record)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., O]`` in the dtype of `x`."""
        if self._kernel is not None and x.is_cpu and x.dtype in KERNEL_DTYPES and x.shape[-1] == self.in_features:
            out = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
            self._kernel.step(x.contiguous(), self.record, out)
        else:
            x_rows, in_panels = x.reshape(-1, self.in_features), self.in_panels and not self.record.is_cpu
            record = self.record if in_panels else self.in_rows()
            rows = record_linear(x_rows, record, self.shape, self.codec, "weight", in_panels=in_panels)
            out = rows.view(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            out += self.bias
        return out

    @property
    def has_kernel(self) -> bool:
        """Whether the native kernels read its record, on the CPU."""
        return self._kernel is not None and self.record.is_cpu

    @property
    def in_panels(self) -> bool:
        """Whether the record is in panels: see `kernels.PanelOrder`."""
        return self._order is not None and (self.record.is_cpu or self._keeps_panels)

    def as_projection(self) -> kernels.Linear:
        """As kernels of several linears take it: it `has_kernel`."""
        return kernels.Linear(
            codec=self.codec.name,
            shape=self.shape,
            layout=self.codec.layout(self.shape),
            record=self.record,
            bias=self.bias,
            in_panels=self.in_panels,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={self.codec.name}"

    def in_rows(self) -> Tensor:
        """The record in rows; a copy where it is in panels."""
        if self._order is None or not self.in_panels:
            return self.record
        assert self.record.is_cpu
        record = self.record.clone()
        self._order.to_rows(record)
        return record

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, as `.to()` does, in the order of the other device."""
        was_in_panels, rows = self.in_panels, None
        if was_in_panels and not self._keeps_panels and not fn(self.record[:0]).is_cpu:
            rows = fn(self.in_rows())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if rows is not None:
            self.record = rows
        elif self._order is not None and self.in_panels and not was_in_panels:
            self._order.to_panels(self.record)
        return self


class RecordEmbedding(nn.Module):
    """An embedding whose rows stay in a type of GGUF and are decoded when they are looked up."""

    record: Tensor

    def __init__(self, record: Tensor, shape: ExpertShape, codec: GgufCodec, dtype: torch.dtype) -> None:
        """record: in rows, of one matrix `weight` ``[V, H]``; dtype: of what it returns."""
        super().__init__()
        (part,) = codec.parts(shape)
        self.kind, self.dtype = part.kind, dtype
        self.num_embeddings, self.embedding_dim = part.num_rows, part.matrix.in_features
        self.register_buffer("record", record[: part.num_bytes].view(part.num_rows, -1), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Its shape and dtype alone, on `meta`: as a table of numbers it is never in memory."""
        return torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device="meta")

    def forward(self, ids: Tensor) -> Tensor:
        """``[...] -> [..., H]``."""
        unique, places = ids.flatten().unique(return_inverse=True)
        rows = decode_anywhere(self.kind, self.record[unique]).to(self.dtype)
        return rows[places].view(*ids.shape, self.embedding_dim)


class NarrowEmbedding(nn.Module):
    """An embedding of bf16 numbers whose rows are widened when they are looked up: the same values in half the memory.

    The weight is a buffer: the model's dtype is that of its parameters.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """weight: bf16 ``[V, H]``; dtype: of what it returns."""
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """``[...] -> [..., H]``."""
        return nn.functional.embedding(ids, self.weight).to(self.dtype)


class NarrowLinear(nn.Module):
    """A linear of bf16 numbers that are widened when they are used: the same values in half the memory."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """weight: bf16 ``[O, K]``; dtype: of what it takes and returns."""
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., O]``."""
        return nn.functional.linear(x, self.weight.to(self.dtype), self.bias)


def number_linear(weight: Tensor, bias: Tensor | None = None) -> kernels.Linear:
    """A linear that is not quantized, for the kernels: weight fp32 or bf16 ``[O, K]``.

    In bf16 where the numbers are the same, as they are where the checkpoint was: half the bytes.
    """
    narrow = exact_bf16(weight)
    return kernels.Linear.of_numbers((weight if narrow is None else narrow).contiguous(), bias)


def exact_bf16(weight: Tensor) -> Tensor | None:
    """The same numbers in bf16; None where they are others."""
    narrow = weight.to(torch.bfloat16)
    is_same = weight.dtype == torch.bfloat16 or torch.equal(narrow.to(weight.dtype), weight)
    return narrow if is_same else None


def lookup_tables(model: nn.Module, ignored: str | None = None) -> set[str]:
    """Names of the embeddings that are only looked up: plain ones whose weight no other module has.

    ignored: a module that will get a weight of its own, such as a head that is about to be quantized.
    """
    owners = Counter(
        id(parameter)
        for name, module in model.named_modules()
        for parameter in module._parameters.values()
        if name != ignored and parameter is not None
    )
    return {
        name
        for name, module in model.named_modules()
        # A subclass may scale what it looks up.
        if type(module) is nn.Embedding and module.max_norm is None and owners[id(module.weight)] == 1
    }


def quantize_linear(weight: Tensor, codec: Codec, *, is_exact: bool = False, keeps_panels: bool = False) -> QuantLinear:
    """A linear layer of a weight ``[O, K]``, quantized now. Its bias, if it has one, stays outside the record.

    Raises: CheckpointError when a weight is not finite.
    """
    shape = weight_shape(*weight.shape)
    record = kernels.fast_encoding(codec).encode(shape, {"weight": weight})
    kept = record[: codec.layout(shape).num_bytes].clone()
    return QuantLinear(kept, shape, codec, is_exact=is_exact, keeps_panels=keeps_panels)
