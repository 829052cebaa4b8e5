"""A request in the engine's thread: its prompt, its choices one after the other, and what it cost."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch

from offload_moe.chat.answer import CONTEXT_TOKENS
from offload_moe.chat.generation import Generation, TokenRequest
from offload_moe.chat.prefix import PrefixCache
from offload_moe.chat.reasoning import TAG_PAIRS, PlainSplitter, Splitter, is_harmony, make_splitter
from offload_moe.chat.steering import Steering
from offload_moe.errors import BudgetError
from offload_moe.serve.board import Board, Running
from offload_moe.serve.choice import ChoiceText, Reading
from offload_moe.serve.errors import closed
from offload_moe.serve.events import ChoiceEnd, Event, Failed, Finished, Started, Usage
from offload_moe.serve.guide import Grammar, Guide, Guides
from offload_moe.serve.host import Host, Loaded
from offload_moe.serve.prompts import Prompts, Rendered
from offload_moe.serve.scoring import LogprobRecorder, processors_of
from offload_moe.serve.settings import Settings
from offload_moe.serve.tools.by_template import TemplateCalls, special_texts
from offload_moe.serve.tools.formats import HARMONY
from offload_moe.serve.tools.grammars import arguments_grammar
from offload_moe.serve.tools.harmony import HarmonyCalls
from offload_moe.serve.tools.parser import CallParser, Parser
from offload_moe.serve.tools.tool import NO_TOOLS, Tool, ToolUse
from offload_moe.serve.worker import Job, WaitForRoom, Work

Emit = Callable[[Event], None]
END: Final = -1  # no token


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be answered, in no API's form, with its prompt rendered. guides: made where a grammar is needed."""

    id: str
    prompts: Prompts
    rendered: Rendered
    settings: Settings = field(default_factory=Settings)
    num_choices: int = 1
    tools: ToolUse = NO_TOOLS
    grammar: Grammar | None = None
    guides: Guides | None = None


@dataclass(slots=True)
class _Cost:
    num_cached: int = 0
    num_generated: int = 0
    num_reasoning: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    hits: int = 0
    misses: int = 0
    stall_s: float = 0.0


class Answering:
    """The work of one request. `running` is what others may see of it."""

    def __init__(self, host: Host, loaded: Loaded, request: Request, emit: Emit) -> None:
        self._board: Board = host.board
        self._worker = host.worker
        self._loaded, self._request, self._emit = loaded, request, emit
        self._cost = _Cost()
        self._asked_at = time.monotonic()
        self.running = Running(id=request.id, num_prompt=len(request.rendered.ids))

    def work(self, job: Job) -> Work:
        """See `Worker`. Errors become events, but for a lack of room beside other requests."""
        self.running.began_at = time.monotonic()
        self._board.running[self.running.id] = self.running
        try:
            yield from self._choices(job)
        except WaitForRoom:
            self._board.running.pop(self.running.id, None)
            raise
        except BaseException as error:
            self._board.end(self.running, "failed")
            self._emit(Failed(error=error))
            if not isinstance(error, Exception):
                raise
            return
        if job.stop.is_set():  # the client has left, or the server ends
            self._board.end(self.running, "cancelled")
            self._emit(Failed(error=closed()))
        else:
            self._board.end(self.running, "finished")
            self._emit(Finished(usage=self._usage()))

    def _choices(self, job: Job) -> Work:
        """One after the other, with one cache."""
        prefixes = self._loaded.prefixes
        prefix = prefixes.lend(self._request.rendered.ids)
        try:
            for number in range(self._request.num_choices):
                if not prefixes.keeps_any:
                    prefix.clear()
                if not job.stop.is_set():
                    yield from self._choice(number, prefix, job)
        finally:
            prefixes.give_back(prefix)

    def _choice(self, number: int, prefix: PrefixCache, job: Job) -> Work:
        job.is_in_prompt = True
        choice = self._read_choice(number)
        generation = self._generation(prefix, choice, number, job)
        self._began(number, generation)
        with closing(generation.steps()) as steps:
            while choice.reason is None:
                token = self._next(steps, generation)
                job.is_in_prompt = token is None
                if token == END:
                    events = choice.end("interrupted" if job.stop.is_set() else generation.end)
                elif token is None:
                    done, _ = generation.prompt_progress
                    self.running.num_done = generation.num_reused + done
                    events = []
                else:
                    self._took(number, generation)
                    events = choice.take(token)
                for event in events:
                    self._emit(event)
                yield
        self._ended(generation, choice)
        assert choice.reason is not None
        self._emit(ChoiceEnd(choice=number, reason=choice.reason, stop=choice.stop))

    def _next(self, steps: Generator[int | None, None, None], generation: Generation) -> int | None:
        """A token, None for a part of the prompt, or END. An answer that memory has no more room for ends."""
        try:
            with self._counted():
                return next(steps, END)
        except (BudgetError, torch.OutOfMemoryError) as error:
            if generation.tokens:
                return END
            if isinstance(error, BudgetError):
                raise
            raise BudgetError(
                f"Out of device memory in a prompt of {generation.num_prompt_tokens:,} tokens. Start the server with a "
                "smaller --vram, or with fewer --cache-slots."
            ) from error

    def _generation(self, prefix: PrefixCache, choice: ChoiceText, number: int, job: Job) -> Generation:
        """Kept caches make room for the prompt; then it waits for other requests to end."""
        request, model = self._request, self._loaded.model
        recorder, settings = choice.recorder, request.settings
        stop_ids = request.prompts.format.stop_ids
        steering = Steering(
            processors=[*processors_of(settings, len(request.rendered.ids)), choice],
            observe=recorder.observe if recorder is not None else Steering().observe,
            forced=choice.forced if recorder is None else Steering().forced,
        )
        tokens = TokenRequest(
            ids=request.rendered.ids,
            boundary=lambda: request.prompts.boundary(request.rendered),
            make_config=lambda most: settings.generation_config(model.hf, stop_ids=stop_ids, max_new_tokens=most),
            stop_ids=stop_ids,
            tokenizer=model.tokenizer,
            max_new_tokens=settings.max_tokens,
            seed=settings.seed_of(number),
            steering=steering,
            speculator=prefix.guessing.speculator(),
        )
        while True:
            try:
                return Generation(model.hf, prefix, tokens, stop_event=job.stop, room=model.room)
            except BudgetError:
                if self._loaded.prefixes.make_room():
                    continue
                if self._worker.num_running > 1 and not number:
                    raise WaitForRoom from None
                raise

    def _read_choice(self, number: int) -> ChoiceText:
        request = self._request
        prompt_format, settings = request.prompts.format, request.settings
        tools = request.tools.callable
        parser, texts = self._parser(number, tools)
        reading = Reading(
            tokenizer=self._loaded.model.tokenizer,
            context=request.rendered.ids[-CONTEXT_TOKENS:],
            special_tokens=prompt_format.special_tokens,
            stop_ids=() if settings.ignores_end else prompt_format.stop_ids,
            token_bytes=self._loaded.token_bytes,
            texts=frozenset(texts),
        )
        return ChoiceText(
            number,
            reading,
            self._splitter(tools),
            stops=settings.stop,
            parser=parser,
            is_parallel=request.tools.is_parallel,
            guide=self._guide(),
            guide_of=self._guide_of,
            tools=tools,
            recorder=LogprobRecorder(settings.top_logprobs) if settings.top_logprobs is not None else None,
        )

    def _parser(self, number: int, tools: dict[str, Tool]) -> tuple[Parser | None, Sequence[str]]:
        """How calls are read, and the special tokens that are a part of them."""
        prompts, tokenizer = self._request.prompts, self._loaded.model.tokenizer
        if not tools or prompts.call_format is HARMONY:
            return None, ()
        if prompts.has_own_parser:
            special = special_texts(tokenizer, [*prompts.format.special_tokens.values()])
            return TemplateCalls(tokenizer, tools, number), special
        return CallParser(prompts.call_format, tools, number), prompts.call_format.special

    def _splitter(self, tools: dict[str, Tool]) -> Splitter:
        request = self._request
        template = request.prompts.format.template
        if template is not None and is_harmony(template) and tools:
            return HarmonyCalls(tools, is_in_answer=request.rendered.unfinished is not None)
        if not request.rendered.messages:
            return PlainSplitter()
        return make_splitter(template=template, prompt=request.rendered.text, unfinished=request.rendered.unfinished)

    def _guide(self) -> Guide | None:
        request = self._request
        if request.grammar is None or request.guides is None:
            return None
        guide = request.guides.make(request.grammar)
        template = request.prompts.format.template or ""
        first = [self._loaded.first_token(opening) for opening, _ in TAG_PAIRS if opening in template]
        guide.openings = frozenset(token for token in first if token is not None)
        return guide

    def _guide_of(self, tool: Tool) -> Guide | None:
        request = self._request
        if request.guides is None or request.prompts.has_own_parser:
            return None
        return request.guides.make(arguments_grammar(request.prompts.call_format, tool, request.prompts.special_ids))

    def _began(self, number: int, generation: Generation) -> None:
        cached = generation.num_reused
        self.running.num_cached, self.running.num_done, self.running.num_generated = cached, cached, 0
        if number == 0:
            self._cost.num_cached = cached
            self._emit(Started(num_prompt=generation.num_prompt_tokens, num_cached=cached))

    def _took(self, number: int, generation: Generation) -> None:
        self.running.num_generated += 1
        self._board.num_generated_tokens += 1
        if self.running.num_generated == 1:
            self._board.num_prompt_tokens += generation.num_prompt_tokens - generation.num_reused
            self._board.num_cached_tokens += generation.num_reused
            if number == 0:
                self._board.first_token_s.add(time.monotonic() - self._asked_at)

    def _ended(self, generation: Generation, choice: ChoiceText) -> None:
        cost, totals, share = self._cost, self._loaded.model.stats, generation.share
        num_new = len(generation.tokens)
        cost.hits += share.num_hits
        cost.misses += share.num_absent
        cost.stall_s += share.stall_s
        cost.num_generated += num_new
        cost.num_reasoning += choice.num_reasoning
        cost.prompt_s += generation.prompt_s
        cost.decode_s += generation.decode_s
        totals.num_prompt_tokens += generation.num_prompt_tokens - generation.num_reused
        totals.prompt_s += generation.prompt_s
        totals.num_decode_tokens += max(0, num_new - 1)
        totals.decode_s += generation.decode_s

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """What the experts do in this step belongs to this request, but for its part in shared passes, see `_ended`."""
        counters, cost = self._loaded.model.stats, self._cost
        hits, accesses, stall_s = counters.num_hits, counters.num_accesses, counters.stall_s
        try:
            yield
        finally:
            counters = self._loaded.model.stats
            new_hits = counters.num_hits - hits
            cost.hits += new_hits
            cost.misses += counters.num_accesses - accesses - new_hits
            cost.stall_s += counters.stall_s - stall_s

    def _usage(self) -> Usage:
        cost = self._cost
        return Usage(
            num_prompt=len(self._request.rendered.ids),
            num_cached=cost.num_cached,
            num_generated=cost.num_generated,
            num_reasoning=cost.num_reasoning,
            prompt_s=cost.prompt_s,
            decode_s=cost.decode_s,
            hits=cost.hits,
            misses=cost.misses,
            stall_s=cost.stall_s,
        )
