// The messages of the open conversation. It follows the newest words as long as the user is at the end.

import { element, iconButton } from "./dom.js";
import { MessageView } from "./message.js";
import { pathOf } from "./conversation.js";

const NEAR_END = 80; // pixels

/**
 * Shows `chats.open` in an element that scrolls, and `welcome` where there are no messages. `focusLost` is called when
 * what had the focus has gone: the field of a message that was edited, the button of an answer that was tried again.
 */
export class Thread {
  constructor(scroller, chats, { welcome, focusLost }) {
    this.scroller = scroller;
    this.chats = chats;
    this.welcome = welcome;
    this.focusLost = focusLost;
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
    const hadFocus = this.list.contains(document.activeElement);
    const focused = document.activeElement?.closest?.(".pager [data-step]");
    const position = focused ? [...this.list.children].indexOf(focused.closest("article")) : -1;
    const views = path.map(({ message, siblings }) => this.viewOf(message, siblings));
    this.views = new Map(views.map((view) => [view.message.id, view]));
    this.place(views.length ? views.map((view) => view.element) : [this.welcome]);
    if (focused) this.refocus(focused.dataset.step, position);
    if (hadFocus && !this.list.contains(document.activeElement)) this.focusLost();
    if (isOther || this.chats.answer) this.follow();
  }

  /** What stays is not moved: a selection, a focus and the place in wide code are kept. */
  place(elements) {
    let next = this.list.firstChild;
    for (const each of elements) {
      if (each === next) next = next.nextSibling;
      else this.list.insertBefore(each, next);
    }
    while (next) {
      const gone = next;
      next = next.nextSibling;
      gone.remove();
    }
  }

  viewOf(message, siblings) {
    const key = `${siblings.length}`;
    const view = this.views.get(message.id);
    if (view?.key === key && !view.editor) return view;
    return Object.assign(new MessageView(this.chats, message, siblings), { key });
  }

  /** After turning to another version, the button that did it has gone with the old one. */
  refocus(step, position) {
    const buttons = [...(this.list.children[position]?.querySelectorAll("[data-step]:enabled") ?? [])];
    (buttons.find((button) => button.dataset.step === step) ?? buttons[0])?.focus();
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
