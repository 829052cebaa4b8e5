// The view of one message: the user's words as they were typed, the model's as markdown.

import { copyButton, element, growing, iconButton, isComposing, show } from "./dom.js";
import { count, milliseconds, number, percent } from "./format.js";
import { Markdown } from "./markdown.js";

/** `element` shows a message; `update` follows its changes. `chats` receives what the user does. */
export class MessageView {
  constructor(chats, message, siblings) {
    this.chats = chats;
    this.message = message;
    this.isUser = message.role === "user";
    this.content = element("div", { class: this.isUser ? "words" : "prose", dir: this.isUser && "auto" });
    this.foot = element("div", { class: "foot" });
    const name = this.isUser ? "You" : "Answer";
    this.element = element("article", { class: message.role, "aria-label": name }, this.content, this.foot);
    if (!this.isUser) this.prepareAnswer();
    this.update();
    this.showSiblings(siblings);
  }

  prepareAnswer() {
    this.markdown = new Markdown(this.content);
    this.thought = element("div", { class: "prose" });
    this.thinking = new Markdown(this.thought);
    this.summary = element("summary");
    const ontoggle = () => this.updateReasoning();
    this.reasoning = element("details", { class: "reasoning", hidden: true, ontoggle }, this.summary, this.thought);
    this.waiting = element("div", { class: "waiting", hidden: true });
    this.content.before(this.reasoning, this.waiting);
    this.fault = element("p", { class: "fault", role: "alert", hidden: true });
    this.content.after(this.fault);
  }

  update() {
    if (this.isUser) this.content.textContent = this.message.content;
    else this.updateAnswer();
    if (this.shownState !== this.message.state) this.showFoot();
    this.shownState = this.message.state;
  }

  updateAnswer() {
    const { content, reasoning, state, error } = this.message;
    this.markdown.update(content);
    this.reasoning.hidden = !reasoning;
    if (reasoning) this.updateReasoning();
    const isWaiting = state === "writing" && !content && !reasoning;
    this.waiting.hidden = !isWaiting;
    if (isWaiting) this.showWaiting();
    this.fault.hidden = state !== "failed";
    if (state === "failed") this.fault.textContent = error;
    this.element.classList.toggle("writing", state === "writing");
    this.element.setAttribute("aria-busy", `${state === "writing"}`);
  }

  /** Reasoning is folded: its text is built when it is unfolded. */
  updateReasoning() {
    const { content, reasoningMs, state } = this.message;
    if (state === "writing" && !content) this.summary.textContent = "Thinking…";
    else this.summary.textContent = reasoningMs >= 1000 ? `Thought for ${milliseconds(reasoningMs)}` : "Thoughts";
    if (this.reasoning.open) this.thinking.update(this.message.reasoning);
  }

  showWaiting() {
    const progress = this.chats.answer?.progress;
    if (this.waiting.childElementCount !== 2) {
      show(this.waiting, element("span"), element("progress", { "aria-label": "Prompt", max: "1" }));
    }
    const [label, bar] = this.waiting.children;
    label.textContent = progress ? wordsFor(progress) : "Waiting for the first token";
    bar.hidden = !progress;
    if (progress) bar.value = progress.total ? progress.processed / progress.total : 0;
  }

  showFoot() {
    const isWriting = this.message.state === "writing";
    const copy = copyButton(this.isUser ? "Copy your message" : "Copy the answer", () => this.message.content);
    const again = this.isUser
      ? iconButton("edit", "Edit", () => this.edit())
      : iconButton("retry", "Try again", () => this.chats.retry(this.message));
    this.pager ??= element("span", { class: "pager" });
    const note = element("span", { class: "note" }, isWriting ? "" : noteOf(this.message));
    show(this.foot, this.pager, ...(isWriting ? [] : [copy, again]), note);
  }

  showSiblings(siblings) {
    if (siblings.length < 2) return;
    const at = siblings.indexOf(this.message);
    const kind = this.isUser ? "version" : "answer";
    const button = (symbol, name, step, disabled) =>
      iconButton(symbol, name, () => this.turn(step), { disabled, "data-step": `${step}` });
    show(
      this.pager,
      button("previous", `Previous ${kind}`, -1, at === 0),
      element("span", { "aria-label": `${kind} ${at + 1} of ${siblings.length}` }, `${at + 1}/${siblings.length}`),
      button("next", `Next ${kind}`, 1, at === siblings.length - 1),
    );
  }

  turn(step) {
    this.chats.choose(this.message, step);
  }

  /** The words in a field, in their place. Enter sends them, Escape leaves them as they were. */
  edit() {
    if (this.editor) return;
    const area = element("textarea", { class: "editor", dir: "auto", rows: "2", "aria-label": "Edit your message" });
    area.value = this.message.content;
    const close = () => {
      this.editor.replaceWith(this.content);
      this.editor = null;
      this.foot.hidden = false;
      this.foot.querySelector('[aria-label="Edit"]')?.focus();
    };
    const send = () => {
      const text = area.value.trim();
      if (text) this.chats.edit(this.message, text);
    };
    const keys = { Enter: send, Escape: close };
    area.addEventListener("keydown", (event) => {
      if (isComposing(event) || (event.key === "Enter" && event.shiftKey) || !keys[event.key]) return;
      event.preventDefault();
      event.stopPropagation();
      keys[event.key]();
    });
    const buttons = element(
      "div",
      { class: "choices" },
      element("button", { type: "button", class: "quiet", onclick: close }, "Cancel"),
      element("button", { type: "button", class: "strong", onclick: send }, "Send"),
    );
    this.editor = element("div", { class: "editing" }, area, buttons);
    this.content.replaceWith(this.editor);
    this.foot.hidden = true;
    growing(area);
    area.focus();
  }
}

function wordsFor({ processed, total, cache }) {
  const words = `Reading the prompt: ${count(processed, "token")} of ${total.toLocaleString("en")}`;
  return cache ? `${words}, ${cache.toLocaleString("en")} kept from before` : words;
}

/** What an answer cost, in one line. */
function noteOf({ role, state, content, finish, usage, timings, firstMs }) {
  if (role === "user") return "";
  const words = [];
  if (state === "stopped") words.push("stopped");
  if (state === "done" && !content) words.push("an answer without words");
  if (finish === "length") words.push("ended at the token limit");
  const tokens = timings?.predicted_n ?? usage?.completion_tokens;
  if (tokens) words.push(count(tokens, "token"));
  if (tokens > 1 && timings?.predicted_ms > 0) words.push(`${number((tokens * 1000) / timings.predicted_ms)}/s`);
  if (firstMs && tokens) words.push(`first after ${milliseconds(firstMs)}`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached) words.push(`${cached.toLocaleString("en")} of the prompt kept`);
  const experts = timings?.hits + timings?.misses;
  if (experts > 0) words.push(`${percent(timings.hits / experts)} hits`);
  if (tokens && timings?.stall_ms > 0) words.push(`${milliseconds(timings.stall_ms / tokens)} stall/token`);
  return words.join(" · ");
}
