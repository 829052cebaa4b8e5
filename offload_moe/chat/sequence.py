"""The token ids of a sequence that grows: a list, and a tensor where one is needed."""

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenIds:
    """Grows at its end. ids: all of them."""

    def __init__(self, tensor: Tensor) -> None:
        """tensor: ``[1, S]``."""
        self._tensor = tensor
        self.ids: list[int] = tensor[0].tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, token: int) -> None:
        self.ids.append(token)

    @property
    def device(self) -> torch.device:
        return self._tensor.device

    def tensor(self) -> Tensor:
        """``[1, S]``."""
        if new := self.ids[self._tensor.shape[1] :]:
            self._tensor = torch.cat((self._tensor, self._tensor.new_tensor([new])), -1)
        return self._tensor

    def last(self, count: int, behind: Sequence[int] = ()) -> Tensor:
        """The last tokens, and some that are not in the sequence behind them: ``[1, T]``."""
        return self._tensor.new_tensor([[*self.ids[-count:], *behind]])
