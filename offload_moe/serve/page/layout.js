// Which of the side panels are open. Beside the conversation where there is room, above it where there is not.

import { iconButton } from "./dom.js";

const NAME = "offload-moe panels";
const NARROW = matchMedia("(max-width: 1099px)"); // as in style.css: panels lie above the conversation
const SMALL = matchMedia("(max-width: 799px)"); // the list of conversations too

/** A button opens and closes each panel. `changed` is called with the name of the panel at the right, or null. */
export class Layout {
  constructor(changed) {
    this.changed = changed;
    this.scrim = document.getElementById("scrim");
    this.panels = new Map([
      ["sidebar", this.panel("sidebar", "menu", "Conversations", "left", "left")],
      ["settings", this.panel("settings", "settings", "Settings", "right", "right")],
      ["live", this.panel("live", "live", "The hierarchy at work", "right", "right")],
    ]);
    this.scrim.addEventListener("click", () => this.closeOverlay());
    for (const query of [NARROW, SMALL]) query.addEventListener("change", () => this.restore());
    this.restore();
  }

  panel(id, symbol, name, place, side) {
    const button = iconButton(symbol, name, () => this.toggle(id), { "aria-controls": id, "aria-expanded": "false" });
    document.getElementById(place).append(button);
    return { button, side, target: document.getElementById(id) };
  }

  isOpen(id) {
    return !this.panels.get(id).target.hidden;
  }

  isOverlay(id) {
    return id === "sidebar" ? SMALL.matches : NARROW.matches;
  }

  toggle(id) {
    this.set(id, !this.isOpen(id));
    this.keep();
    const { target } = this.panels.get(id);
    if (this.isOpen(id) && this.isOverlay(id)) target.querySelector("button, input, textarea, [tabindex]")?.focus();
  }

  /** At most one panel on each side, and one above the conversation. */
  set(id, isOpen) {
    const { side } = this.panels.get(id);
    for (const [other, panel] of this.panels) {
      const isRival = other !== id && (panel.side === side || (this.isOverlay(other) && this.isOverlay(id)));
      if (other === id || (isOpen && isRival)) {
        panel.target.hidden = !(isOpen && other === id);
        panel.button.setAttribute("aria-expanded", `${isOpen && other === id}`);
      }
    }
    this.scrim.hidden = !this.overlay();
    document.querySelector("main").inert = Boolean(this.overlay());
    this.changed(["settings", "live"].find((name) => this.isOpen(name)) ?? null);
  }

  /** The panel that lies above the conversation. */
  overlay() {
    return [...this.panels.keys()].find((id) => this.isOpen(id) && this.isOverlay(id)) ?? null;
  }

  /** Whether there was one to close. The focus returns to its button. */
  closeOverlay() {
    const id = this.overlay();
    if (!id) return false;
    this.set(id, false);
    this.panels.get(id).button.focus();
    return true;
  }

  keep() {
    if (NARROW.matches) return;
    const open = [...this.panels.keys()].filter((id) => this.isOpen(id));
    try {
      localStorage.setItem(NAME, JSON.stringify(open));
    } catch {
      // not permitted: the page begins as usual the next time
    }
  }

  restore() {
    let open = ["sidebar", "live"];
    try {
      open = JSON.parse(localStorage.getItem(NAME) ?? "null") ?? open;
    } catch {
      // what is kept there is not ours
    }
    for (const id of this.panels.keys()) this.set(id, open.includes(id) && !this.isOverlay(id));
  }
}
