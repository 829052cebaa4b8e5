// The messages of the open conversation. It follows the newest words as long as the user is at the end.

import { element, iconButton, show } from "./dom.js";
import { MessageView } from "./message.js";
import { pathOf } from "./conversation.js";

const NEAR_END = 80; // pixels

/** Shows `chats.open` in an element that scrolls. */
export class Thread {
  constructor(scroller, chats, welcome) {
    this.scroller = scroller;
    this.chats = chats;
    this.welcome = welcome;
    this.views = new Map(); // by message
    this.changed = new Set();
    this.isFollowing = true;
    this.list = element("div", { class: "messages" });
    this.toEnd = iconButton("down", "To the newest words", () => this.follow(), { class: "icon to-end", hidden: true });
    scroller.append(this.list);
    scroller.after(this.toEnd);
    scroller.addEventListener("scroll", () => this.noticeScroll(), { passive: true });
    new ResizeObserver(() => this.keepEnd()).observe(this.list);
    chats.addEventListener("path", () => this.render());
    chats.addEventListener("message", ({ detail }) => this.schedule(detail));
    this.render();
  }

  /** Messages that stay keep their views, so that nothing jumps and nothing is built twice. */
  render() {
    const path = pathOf(this.chats.open);
    const isOther = this.chats.open !== this.conversation;
    this.conversation = this.chats.open;
    if (isOther) this.views.clear();
    const focused = document.activeElement?.closest?.(".pager [data-step]");
    const position = focused ? [...this.list.children].indexOf(focused.closest("article")) : -1;
    const views = path.map(({ message, siblings }) => this.viewOf(message, siblings));
    this.views = new Map(views.map((view) => [view.message.id, view]));
    show(this.list, ...(views.length ? views.map((view) => view.element) : [this.welcome]));
    if (focused) this.refocus(focused.dataset.step, position);
    if (isOther || this.chats.answer) this.follow();
  }

  viewOf(message, siblings) {
    const key = `${siblings.length}`;
    const view = this.views.get(message.id);
    if (view?.key === key && !view.editor) return view;
    return Object.assign(new MessageView(this.chats, message, siblings), { key });
  }

  /** After turning to another version, the button that did it has gone with the old one. */
  refocus(step, position) {
    const buttons = [...(this.list.children[position]?.querySelectorAll("[data-step]") ?? [])];
    (buttons.find((button) => button.dataset.step === step && !button.disabled) ?? buttons.find((button) => !button.disabled))?.focus();
  }

  schedule(message) {
    this.changed.add(message.id);
    if (document.hidden) return this.flush();
    this.frame ??= requestAnimationFrame(() => this.flush());
  }

  flush() {
    this.frame = null;
    for (const id of this.changed) this.views.get(id)?.update();
    this.changed.clear();
  }

  noticeScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.isFollowing = scrollHeight - scrollTop - clientHeight < NEAR_END;
    this.toEnd.hidden = this.isFollowing;
  }

  keepEnd() {
    if (this.isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.noticeScroll();
  }

  follow() {
    this.isFollowing = true;
    this.keepEnd();
    this.toEnd.hidden = true;
  }
}
