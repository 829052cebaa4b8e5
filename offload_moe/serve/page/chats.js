// The conversations, the one that is open, and the answers that are being written. Views listen and never write.

import { Answer } from "./answer.js";
import { add, chooseSibling, newConversation, pathOf, requestMessages, settle } from "./conversation.js";
import { samplingOf } from "./settings.js";

const SAVE_MS = 1000;

/**
 * Events: "titles" (the list has changed), "path" (other messages are shown), "message" (`detail`: one that changed),
 * "ended" (`detail`: the message of an answer that has), "unsaved" (the browser keeps no more).
 */
export class Chats extends EventTarget {
  constructor(store, connection, settings) {
    super();
    this.store = store;
    this.connection = connection;
    this.settings = settings;
    this.titles = [];
    this.open = newConversation();
    this.answers = new Map(); // by conversation
    store.addEventListener("change", ({ detail }) => this.adopt(detail));
  }

  async load(id) {
    this.titles = await this.store.titles();
    this.emit("titles");
    if (id && this.titles.some((title) => title.id === id)) await this.select(id);
  }

  /** The answer that is being written in the open conversation. */
  get answer() {
    return this.answers.get(this.open.id)?.answer;
  }

  async select(id) {
    this.selected = id;
    const conversation = this.answers.get(id)?.conversation ?? (await this.store.get(id));
    if (conversation && this.selected === id) this.show(this.answers.has(id) ? conversation : settle(conversation));
  }

  begin() {
    this.show(newConversation());
  }

  /** Add the user's words to the open conversation, and an answer. */
  send(text) {
    const last = pathOf(this.open).at(-1)?.message;
    return this.answerTo(add(this.open, last?.id ?? "", "user", { content: text }));
  }

  /** The same place in the conversation with other words: a branch of its own. */
  edit(message, text) {
    return this.answerTo(add(this.open, message.parent, "user", { content: text }));
  }

  /** Another answer to the same words. */
  retry(message) {
    return this.answerTo(this.open.messages[message.parent]);
  }

  choose(message, step) {
    chooseSibling(this.open, message, step);
    this.emit("path");
    this.save(this.open);
  }

  stop() {
    this.answer?.stop();
  }

  async rename(id, title) {
    const loaded = id === this.open.id ? this.open : this.answers.get(id)?.conversation;
    const conversation = loaded ?? (await this.store.get(id));
    Object.assign(conversation, { title, isNamed: true });
    await this.save(conversation);
  }

  /** Resolves to a function that brings the conversation back. */
  async remove(id) {
    const running = this.answers.get(id);
    const conversation = running?.conversation ?? (await this.store.get(id));
    running?.answer.stop();
    await running?.ended;
    await this.store.remove(id);
    await this.refresh();
    if (id === this.open.id) this.begin();
    return async () => {
      await this.save(conversation);
      this.show(conversation);
    };
  }

  async answerTo(question) {
    const conversation = this.open;
    const before = this.answers.get(conversation.id);
    before?.answer.stop();
    await before?.ended;
    const message = add(conversation, question.id, "assistant", { state: "writing" });
    conversation.updated = Date.now();
    const answer = new Answer(message, this.requestFor(conversation, question), () => this.changed(running));
    const running = { conversation, message, answer, timer: null };
    running.ended = this.finish(running);
    this.answers.set(conversation.id, running);
    this.emit("path");
    await this.save(conversation);
  }

  requestFor(conversation, question) {
    return {
      model: this.connection.props?.model ?? "offload-moe",
      messages: requestMessages(conversation, question, this.settings.system),
      stream: true,
      stream_options: { include_usage: true },
      return_progress: true,
      ...samplingOf(this.settings),
    };
  }

  /** Resolves when an answer has ended and is saved. */
  async finish(running) {
    const { conversation, message, answer } = running;
    await answer.run();
    clearTimeout(running.timer);
    this.answers.delete(conversation.id);
    if (answer.failure && !answer.isStopped) this.connection.check();
    if (conversation === this.open) this.emit("message", message);
    this.emit("ended", message);
    await this.save(conversation);
  }

  changed(running) {
    if (running.conversation === this.open) this.emit("message", running.message);
    running.timer ??= setTimeout(() => {
      running.timer = null;
      this.save(running.conversation);
    }, SAVE_MS);
  }

  async save(conversation) {
    try {
      await this.store.put(conversation);
    } catch (error) {
      this.emit("unsaved", error);
    }
    await this.refresh();
  }

  async refresh() {
    this.titles = await this.store.titles();
    this.emit("titles");
  }

  /** Another page of this browser has changed a conversation. */
  async adopt(id) {
    await this.refresh();
    if (id !== this.open.id || this.answer) return;
    const conversation = await this.store.get(id);
    if (conversation) this.show(conversation);
  }

  show(conversation) {
    this.open = conversation;
    this.emit("path");
    this.emit("titles");
  }

  emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
