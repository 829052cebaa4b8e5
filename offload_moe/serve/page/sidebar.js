// The list of conversations: open, rename, delete.

import { announce, element, iconButton, isComposing, show } from "./dom.js";

const UNDO_MS = 8000;

/** Shows `chats.titles` in a list; `chosen` is called when the user has opened one. */
export class Sidebar {
  constructor(list, chats, { chosen, toast }) {
    this.list = list;
    this.chats = chats;
    this.chosen = chosen;
    this.toast = toast;
    for (const type of ["titles", "path"]) chats.addEventListener(type, () => this.render());
    chats.addEventListener("ended", () => this.render());
    list.addEventListener("keydown", (event) => this.press(event));
  }

  render() {
    if (this.list.querySelector("input")) return; // a title is being changed
    const state = JSON.stringify([this.chats.titles, this.chats.open.id, [...this.chats.answers.keys()]]);
    if (state === this.state) return;
    this.state = state;
    const focused = document.activeElement?.closest?.("[data-id]")?.dataset.id;
    show(this.list, ...this.chats.titles.map((title) => this.row(title)));
    if (focused) this.list.querySelector(`[data-id="${focused}"] .title`)?.focus();
  }

  row({ id, title }) {
    const name = title || "Untitled";
    const isOpen = id === this.chats.open.id;
    const acts = { onclick: () => this.open(id), ondblclick: () => this.rename(id, title) };
    const attributes = { type: "button", class: "title", dir: "auto", title: name, "aria-current": isOpen && "true" };
    const open = element("button", { ...attributes, ...acts }, name);
    return element(
      "li",
      { "data-id": id, class: this.chats.answers.has(id) && "writing" },
      open,
      iconButton("edit", `Rename ${name}`, () => this.rename(id, title)),
      iconButton("remove", `Delete ${name}`, () => this.remove(id, name)),
    );
  }

  async open(id) {
    if (id !== this.chats.open.id) await this.chats.select(id);
    this.chosen();
  }

  /** Arrows walk through the list, F2 renames, Delete deletes. */
  press(event) {
    const row = event.target.closest(".title")?.parentElement;
    if (!row) return;
    const acts = {
      ArrowDown: () => row.nextElementSibling?.querySelector(".title").focus(),
      ArrowUp: () => row.previousElementSibling?.querySelector(".title").focus(),
      F2: () => row.querySelector('[aria-label^="Rename"]').click(),
      Delete: () => row.querySelector('[aria-label^="Delete"]').click(),
    };
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  }

  rename(id, title) {
    const row = this.list.querySelector(`[data-id="${id}"]`);
    const field = element("input", { class: "rename", "aria-label": "Title", dir: "auto", maxlength: "200" });
    field.value = title;
    let isEnded = false;
    const end = async (isKept) => {
      if (isEnded) return;
      isEnded = true;
      const name = field.value.trim();
      field.remove();
      this.state = null;
      if (isKept && name && name !== title) await this.chats.rename(id, name);
      this.render();
      this.list.querySelector(`[data-id="${id}"] .title`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (isComposing(event) || !["Enter", "Escape"].includes(event.key)) return;
      event.stopPropagation();
      event.preventDefault();
      end(event.key === "Enter");
    });
    field.addEventListener("blur", () => end(true));
    show(row, field);
    field.select();
  }

  async remove(id, name) {
    const position = [...this.list.children].findIndex((row) => row.dataset.id === id);
    const restore = await this.chats.remove(id);
    announce(`Deleted ${name}`);
    this.toast(`Deleted “${name}”`, "Undo", restore, UNDO_MS);
    const rows = this.list.children;
    rows[Math.min(position, rows.length - 1)]?.querySelector(".title").focus();
  }
}
