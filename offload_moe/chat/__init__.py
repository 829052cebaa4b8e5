"""Conversations: template, token stream, reasoning, and a cache that earlier turns stay in."""

from offload_moe.chat.reasoning import Piece
from offload_moe.chat.sampling import Sampling
from offload_moe.chat.session import ChatSession
from offload_moe.chat.stats import TurnStats

__all__ = ["ChatSession", "Piece", "Sampling", "TurnStats"]
