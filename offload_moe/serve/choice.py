"""One answer's tokens as events: text, reasoning, calls of tools, and why it ended."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from offload_moe.chat.reasoning import HarmonySplitter, Piece, Splitter
from offload_moe.chat.stats import Finish
from offload_moe.chat.text import IncrementalText
from offload_moe.serve.events import Event, Logprob, Reason, TextDelta, ToolDelta, ToolStart
from offload_moe.serve.guide import Guide
from offload_moe.serve.scoring import LogprobRecorder
from offload_moe.serve.stops import StopStrings
from offload_moe.serve.tools.harmony import HarmonyCalls
from offload_moe.serve.tools.parser import Called, Parser, call_id
from offload_moe.serve.tools.tool import Tool

REASONS: Mapping[Finish, Reason] = {"length": "length", "context": "length", "memory": "length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How an answer is read. context: the prompt's last ids. token_bytes: of one token, for logprobs."""

    tokenizer: PreTrainedTokenizerBase
    context: Sequence[int]
    special_tokens: Mapping[int, str]
    stop_ids: Collection[int]
    token_bytes: Callable[[int], bytes]
    texts: frozenset[str] = field(default_factory=frozenset)  # special tokens that are text, as those of calls


class ChoiceText(LogitsProcessor):
    """Reads one choice. `reason` is why it ended, None before. As a processor it is its present guide."""

    def __init__(
        self,
        number: int,
        reading: Reading,
        splitter: Splitter,
        *,
        stops: Sequence[str] = (),
        parser: Parser | None = None,
        is_parallel: bool = True,
        guide: Guide | None = None,
        guide_of: Callable[[Tool], Guide | None] = lambda tool: None,
        tools: Mapping[str, Tool] | None = None,
        recorder: LogprobRecorder | None = None,
    ) -> None:
        """guide_of: of a strict tool's arguments."""
        self.reason: Reason | None = None
        self.num_reasoning = 0
        self._number, self._reading, self._splitter = number, reading, splitter
        self._stops = StopStrings(stops)
        self._parser, self._is_parallel = parser, is_parallel
        self._answer_guide, self._guide_of, self._tools = guide, guide_of, tools or {}
        self._call_guide: Guide | None = None
        self.recorder = recorder
        self._text = IncrementalText(reading.tokenizer, reading.context)
        self._logprobs: list[Logprob] = []
        self._guided: str | None = None  # the tool whose call was last seen to begin
        self._recipient: str | None = None
        self._num_harmony_calls = 0
        self._has_begun_reasoning = False
        self._direct_guides()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: ``[1, T]``, scores: ``[1, V]``."""
        return scores if self.guide is None else self.guide(input_ids, scores)

    def forced(self) -> Sequence[int]:
        """See `Steering`."""
        return self.guide.forced() if self.guide is not None and self.reason is None else ()

    @property
    def guide(self) -> Guide | None:
        """That of a call's arguments, or else that of the whole answer."""
        return self._call_guide or self._answer_guide

    @property
    def stop(self) -> str | None:
        """The stop string that was found."""
        return self._stops.found

    @property
    def num_calls(self) -> int:
        return self._num_harmony_calls + (self._parser.num_calls if self._parser is not None else 0)

    def take(self, token: int) -> list[Event]:
        """What became certain with this token."""
        if token in self._reading.stop_ids:
            return self.end("stop")
        if self._splitter.kind == "reasoning" and self._called is None:
            self.num_reasoning += 1
        self._note(token)
        self._guide_takes(token)
        events = [event for piece in self._pieces(token) for event in self._read(piece)]
        self._direct_guides()
        if self._stops.found is not None or self._is_complete or (self.num_calls and not self._goes_on):
            events += self.end("stop")
        return events

    def end(self, finish: Finish) -> list[Event]:
        """Give out what is held back."""
        pieces = [*self._splitter.text(self._text.flush()), *self._splitter.flush()]
        events = [event for piece in pieces for event in self._read(piece)]
        events += self._answer(self._stops.flush())
        if self._parser is not None:
            events += [self._with_logprobs(event) for event in self._parser.flush()]
        reason = REASONS.get(finish, "stop")
        self.reason = "tool_calls" if reason == "stop" and self.num_calls else reason
        return events

    @property
    def _is_complete(self) -> bool:
        guide = self.guide
        return guide is not None and guide.is_active and guide.is_complete

    @property
    def _called(self) -> Called | None:
        """The tool whose arguments are being written, or come next."""
        if isinstance(self._splitter, HarmonyCalls):
            return (self._splitter.recipient, "") if self._splitter.recipient is not None else None
        return self._parser.called(self._stops.held) if self._parser is not None else None

    @property
    def _goes_on(self) -> bool:
        """Whether more may follow a call that has ended."""
        return self._is_parallel or self._called is not None

    def _pieces(self, token: int) -> list[Piece]:
        special = self._reading.special_tokens.get(token)
        if special is None:
            return self._splitter.text(self._text.push(token))
        pieces = self._splitter.text(self._text.flush())
        if special in self._reading.texts:
            return [*pieces, *self._splitter.text(special)]
        return [*pieces, *self._splitter.marker(special)]

    def _read(self, piece: Piece) -> list[Event]:
        recipient = self._splitter.recipient if isinstance(self._splitter, HarmonyCalls) else None
        if recipient is not None:
            return self._call(recipient, piece.text)
        self._recipient = None
        if piece.kind == "reasoning":
            return [TextDelta(choice=self._number, text=piece.text, is_reasoning=True)]
        return self._answer(self._stops.push(piece.text))

    def _answer(self, text: str) -> list[Event]:
        if not text:
            return []
        events = [TextDelta(choice=self._number, text=text)] if self._parser is None else self._parser.push(text)
        return [self._with_logprobs(event) for event in events]

    def _call(self, recipient: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._recipient is None:
            start = ToolStart(choice=self._number, tool=self._num_harmony_calls, id=call_id(), name=recipient)
            self._num_harmony_calls += 1
            events.append(start)
        self._recipient = recipient
        return [*events, ToolDelta(choice=self._number, tool=self._num_harmony_calls - 1, text=text)]

    def _with_logprobs(self, event: Event) -> Event:
        if not self._logprobs or not isinstance(event, TextDelta):
            return event
        logprobs, self._logprobs = self._logprobs, []
        return TextDelta(choice=event.choice, text=event.text, logprobs=logprobs)

    def _note(self, token: int) -> None:
        if self.recorder is None or self._splitter.kind == "reasoning":
            return
        value, top = self.recorder.of(token)
        others = [self._logprob(each, number) for each, number in top]
        self._logprobs.append(self._logprob(token, value, others))

    def _logprob(self, token: int, value: float, top: Sequence[Logprob] = ()) -> Logprob:
        content = self._reading.token_bytes(token)
        text = content.decode("utf-8", "replace")
        return Logprob(token=text, value=max(value, -9999.0), bytes=list(content), top=list(top))

    def _guide_takes(self, token: int) -> None:
        guide = self.guide
        if guide is not None and guide.is_active and not guide.take(token) and guide is self._answer_guide:
            self._has_begun_reasoning = True

    def _direct_guides(self) -> None:
        """The grammar holds in the answer alone; where reasoning may still begin, its first token may come too."""
        called, begun = self._called or (None, "")
        if called != self._guided:
            self._guided, self._recipient = called, None
            self._call_guide = self._arguments_guide(called, begun) if called is not None else None
        guide = self._answer_guide
        if guide is None:
            return
        kind = self._splitter.kind
        is_at_start = kind is None and not isinstance(self._splitter, HarmonySplitter) and not self._has_begun_reasoning
        guide.is_active = guide.is_whole or kind == "answer" or is_at_start

    def _arguments_guide(self, called: str, begun: str) -> Guide | None:
        """Holds the arguments of a strict tool to its schema, unless the grammar of the answer does."""
        tool, answer = self._tools[called], self._answer_guide
        if not tool.is_strict or (answer is not None and answer.is_active):
            return None
        guide = self._guide_of(tool)
        return guide if guide is not None and guide.take_text(begun) else None
