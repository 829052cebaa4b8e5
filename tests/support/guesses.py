"""Guessed tokens without a governor's judgement."""

import pytest

from offload_moe.speculate.governor import Governor
from offload_moe.speculate.guess import MOST_GUESSES


def compute_guesses(monkeypatch: pytest.MonkeyPatch, most: int = MOST_GUESSES) -> None:
    """Every governor has so many guesses computed, whether they pay or not."""
    monkeypatch.setattr(Governor, "choose", lambda self, kind, made, num_behind=0: min(made, most))
