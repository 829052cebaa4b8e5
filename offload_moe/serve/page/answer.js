// One answer: sends the request and writes what comes into a message.

import { eventsOf } from "./events.js";
import { postJson, ServerError } from "./transport.js";

const SILENCE_MS = 60000; // the server sends comments more often

export class Answer {
  /** `changed` is called whenever the message or the progress has changed. */
  constructor(message, request, changed) {
    this.message = message;
    this.request = request;
    this.changed = changed;
    this.progress = null; // {total, cache, processed} while the prompt is computed
    this.began = performance.now();
    this.abort = new AbortController();
    this.isStopped = false;
  }

  /** Ends the answer where it is: the server notices. */
  stop() {
    this.isStopped = true;
    this.abort.abort();
  }

  /** Resolves when the message has its last state. Never raises. */
  async run() {
    try {
      await this.receive();
      if (!this.message.finish) throw new TypeError("the stream has ended early");
      this.message.state = "done";
    } catch (error) {
      Object.assign(this.message, this.isStopped ? { state: "stopped" } : { state: "failed", error: wordsFor(error) });
      this.failure = error;
    } finally {
      clearTimeout(this.silence);
      this.progress = null;
      this.changed();
    }
  }

  async receive() {
    this.listen();
    const response = await postJson("v1/chat/completions", this.request, this.abort.signal);
    for await (const data of eventsOf(response.body)) {
      this.listen();
      if (data === "[DONE]") return;
      if (data) this.apply(JSON.parse(data));
    }
  }

  listen() {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => this.abort.abort(), SILENCE_MS);
  }

  apply(chunk) {
    const message = this.message;
    if (chunk.error) throw new ServerError(0, chunk.error.message);
    if (chunk.prompt_progress) this.progress = chunk.prompt_progress;
    if (chunk.usage) message.usage = chunk.usage;
    if (chunk.timings) message.timings = chunk.timings;
    const choice = chunk.choices?.[0];
    if (choice) {
      const { content, reasoning_content: reasoning } = choice.delta;
      if (content || reasoning) this.note(content);
      message.content += content ?? "";
      message.reasoning += reasoning ?? "";
      if (choice.finish_reason) message.finish = choice.finish_reason;
    }
    this.changed();
  }

  /** The times that the user has seen. */
  note(content) {
    const now = performance.now();
    this.progress = null;
    this.message.firstMs ??= now - this.began;
    if (content) this.message.reasoningMs ??= this.message.reasoning ? now - this.began - this.message.firstMs : 0;
  }
}

function wordsFor(error) {
  if (error instanceof ServerError) return error.message;
  return "The connection to the server was lost.";
}
