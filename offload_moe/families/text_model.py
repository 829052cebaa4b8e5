"""The type of transformers' models that generate text, for annotations alone.

Every such class has `PreTrainedModel` and the mixin that brings `generate`; transformers has no common class of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    import torch
    from torch import nn
    from transformers import GenerationConfig, PreTrainedModel

    class TextModel(PreTrainedModel):
        """What of it is used besides `PreTrainedModel`'s own, the private parts of transformers included."""

        generation_config: GenerationConfig
        generate: Callable[..., Any]
        prepare_inputs_for_generation: Callable[..., dict[str, Any]]
        _prefill: Callable[..., Any]
        _update_model_kwargs_for_generation: Callable[..., dict[str, Any]]
        _prepare_special_tokens: Callable[..., None]
        _get_logits_processor: Callable[..., Any]

        def get_decoder(self) -> Any:
            """Of a class of its family."""

        def get_output_embeddings(self) -> nn.Module | None: ...
        def eval(self) -> Self: ...
        def to(self, *where: Any, **settings: Any) -> Self: ...  # type: ignore[override]

        @property
        def dtype(self) -> torch.dtype: ...

        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool: ...

    class MtpModel(TextModel):
        """A layer for multi-token prediction as a model of its own, with what stands before the layer."""

        enorm: nn.Module
        hnorm: nn.Module
        eh_proj: nn.Module

else:
    TextModel = MtpModel = Any  # importing a type takes no time
