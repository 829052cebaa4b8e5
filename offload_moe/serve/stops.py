"""Stop strings, found also where they span several tokens."""

from collections.abc import Sequence

from offload_moe.chat.reasoning import overlap


class StopStrings:
    """Passes text on, but for what may be the beginning of a stop string: `held`. `found` is the one that ended it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self.held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What is certain to stand before any stop string."""
        if self.found is not None:
            return ""
        held = self.held + text
        hits = [(at, -len(stop), stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if hits:
            at, _, self.found = min(hits)
            self.held = ""
            return held[:at]
        keep = max((overlap(held, stop) for stop in self._stops), default=0)
        self.held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self.held = self.held, ""
        return held
