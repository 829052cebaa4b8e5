// Where the user writes. Enter sends, Shift+Enter begins a line, Escape stops the answer.

import { announce, growing, icon, isComposing, show } from "./dom.js";
import { pathOf } from "./conversation.js";

/** The form at the end of the page; `chats` receives what is sent. */
export class Composer {
  constructor(form, chats) {
    this.form = form;
    this.area = form.querySelector("textarea");
    this.button = form.querySelector("button");
    this.chats = chats;
    this.hasKeyboard = !matchMedia("(pointer: coarse)").matches; // else Enter begins a line, and the button sends
    this.area.setAttribute("enterkeyhint", this.hasKeyboard ? "send" : "enter");
    growing(this.area);
    form.addEventListener("submit", (event) => this.submit(event));
    this.area.addEventListener("keydown", (event) => this.press(event));
    this.area.addEventListener("input", () => this.update());
    for (const type of ["path", "message", "ended"]) chats.addEventListener(type, () => this.update());
    this.update();
  }

  focus() {
    if (this.hasKeyboard) this.area.focus();
  }

  submit(event) {
    event.preventDefault();
    if (this.chats.answer) {
      this.chats.stop();
      return;
    }
    const text = this.area.value.trim();
    if (!text) return;
    this.area.value = "";
    this.area.dispatchEvent(new Event("input"));
    this.chats.send(text);
  }

  press(event) {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey && this.hasKeyboard) this.pressEnter(event);
    if (event.key === "ArrowUp" && !this.area.value) this.editLast(event);
  }

  pressEnter(event) {
    event.preventDefault();
    if (this.chats.answer) announce("An answer is being written. Escape stops it.");
    else this.form.requestSubmit();
  }

  editLast(event) {
    const questions = pathOf(this.chats.open).filter(({ message }) => message.role === "user");
    if (!questions.length || this.chats.answer) return;
    event.preventDefault();
    this.form.dispatchEvent(new CustomEvent("editlast", { detail: questions.at(-1).message, bubbles: true }));
  }

  update() {
    const isWriting = Boolean(this.chats.answer);
    this.button.disabled = !isWriting && !this.area.value.trim();
    if (isWriting === this.isWriting) return;
    this.isWriting = isWriting;
    const name = isWriting ? "Stop the answer" : "Send";
    show(this.button, icon(isWriting ? "stop" : "send"));
    this.button.classList.toggle("stop", isWriting);
    this.button.setAttribute("aria-label", name);
    this.button.title = name;
  }
}
