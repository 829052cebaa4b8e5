// Elements, made without HTML strings. Children are nodes or text; text stays text.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element. `onclick` and its like are listeners; true is an attribute without a value, null and false none. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A button with a symbol: its name is for screen readers and the pointer. */
export function iconButton(symbol, name, onclick, attributes = {}) {
  const usual = { type: "button", class: "icon", "aria-label": name, title: name, onclick };
  return element("button", { ...usual, ...attributes }, icon(symbol));
}

/** A symbol out of lines in a box of 20 x 20. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 20 20");
  drawing.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  drawing.append(path);
  return drawing;
}

const ICONS = {
  menu: "M3 5.5h14M3 10h14M3 14.5h14",
  settings: "M3 6h8M15 6h2M3 14h2M9 14h8M13 4v4M7 12v4",
  live: "M3 16V9M7.7 16V4M12.3 16v-5M17 16V7",
  add: "M10 4v12M4 10h12",
  send: "M10 16V4.5M5 9.5l5-5 5 5",
  stop: "M6 6h8v8H6z",
  copy: "M7 7h9v9H7zM4 13V4h9",
  check: "M4 10.5l4 4 8-9",
  retry: "M16 10a6 6 0 1 1-1.8-4.3M16 3v3.5h-3.5",
  edit: "M4 16l.8-3.5L13.5 3.8l2.7 2.7-8.7 8.7z",
  remove: "M5 5l10 10M15 5L5 15",
  previous: "M12 5l-5 5 5 5",
  next: "M8 5l5 5-5 5",
  down: "M10 4v12M5 11l5 5 5-5",
};

/** Replace what an element shows. */
export function show(target, ...children) {
  target.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

/** Copy text, also where the page has no secure context: there the clipboard's own interface is missing. */
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not permitted: the selection does it
    }
  }
  const area = element("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return isCopied;
}

/** A button that copies and says so for a moment. */
export function copyButton(name, textOf) {
  const button = iconButton("copy", name, async () => {
    const isCopied = await copyText(textOf());
    show(button, icon(isCopied ? "check" : "remove"));
    announce(isCopied ? "Copied" : "The browser does not permit copying");
    setTimeout(() => show(button, icon("copy")), 1500);
  });
  return button;
}

/** Whether a key belongs to the choice of a character. Safari says so by its code alone. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** A field grows with its text, also where the browser's style sheets cannot say so. */
export function growing(area) {
  if (CSS.supports("field-sizing", "content")) return;
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  requestAnimationFrame(fit);
}

/** Text for screen readers, without moving the focus. */
export function announce(text) {
  document.getElementById("announcements").textContent = text;
}
