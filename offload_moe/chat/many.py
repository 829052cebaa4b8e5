"""Answers to many prompts, some of them at once: their steps alternate, so that they share passes while that pays."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import count

from offload_moe.chat.prompt import Prompt
from offload_moe.chat.reasoning import Piece
from offload_moe.errors import BudgetError, OffloadMoeError

Begin = Callable[[Prompt], Generator[Piece | None, None, None]]


class _Asked:
    """A prompt, and its answer so far."""

    def __init__(self, number: int, prompt: Prompt) -> None:
        self.number, self._prompt = number, prompt
        self._steps: Generator[Piece | None, None, None] | None = None
        self.text = ""

    def advance(self, begin: Begin) -> bool:
        """One step. False once the answer has ended."""
        if self._steps is None:
            self._steps, self.text = begin(self._prompt), ""
        for piece in self._steps:
            if piece is None:
                return True
            self.text += piece.text if piece.kind == "answer" else ""
        return False

    def drop(self) -> None:
        """What was computed; it may begin anew."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None


class Many:
    """The answers to these prompts, which are read as they are needed."""

    def __init__(self, begin: Begin, prompts: Iterable[Prompt], parallel: int) -> None:
        """begin: the steps of an answer, in a conversation of its own. parallel: at once, at most."""
        self._begin, self._parallel = begin, parallel
        self._coming = (_Asked(number, prompt) for number, prompt in enumerate(prompts))
        self._again = deque[_Asked]()  # had no room in memory beside the others
        self._running = deque[_Asked]()
        self._ended: dict[int, str | OffloadMoeError] = {}
        self._is_short_of_room = False

    def answers(self) -> Iterator[str]:
        """In the order of the prompts.

        One that memory has no room for beside the others begins anew once one of them has ended. Raises: what an answer
        raises, in its place.
        """
        try:
            for number in count():
                while number not in self._ended:
                    self._admit()
                    if not self._running:
                        return
                    self._running.rotate(-1)
                    self._advance(self._running[-1])
                ended = self._ended.pop(number)
                if isinstance(ended, OffloadMoeError):
                    raise ended
                yield ended
        finally:
            for asked in self._running:
                asked.drop()

    def _admit(self) -> None:
        while len(self._running) < self._parallel and not self._is_short_of_room:
            asked = self._again.popleft() if self._again else next(self._coming, None)
            if asked is None:
                return
            self._running.append(asked)

    def _advance(self, asked: _Asked) -> None:
        try:
            if asked.advance(self._begin):
                return
            self._ended[asked.number] = asked.text
        except OffloadMoeError as error:
            if isinstance(error, BudgetError) and len(self._running) > 1:
                self._again.append(asked)
            else:
                self._ended[asked.number] = error
        self._is_short_of_room = asked.number not in self._ended
        self._running.remove(asked)
        asked.drop()
