// Markdown as nodes, kept up to date while its text grows: blocks whose source is the same stay as they are.

import { parseBlocks } from "./blocks.js";
import { copyButton, element } from "./dom.js";
import { inline } from "./inline.js";

const RIGHT_TO_LEFT = /[\p{sc=Arabic}\p{sc=Hebrew}\p{sc=Syriac}\p{sc=Thaana}\p{sc=Nko}\p{sc=Adlam}]/u;

/** Shows a text in `container`. */
export class Markdown {
  constructor(container) {
    this.container = container;
    this.shown = []; // {type, source, node}
  }

  update(text) {
    const blocks = parseBlocks(text);
    blocks.forEach((block, position) => {
      const before = this.shown[position];
      if (before?.type === block.type && before.source === block.source) return;
      const node = this.extend(before, block) ?? build(block);
      if (before && before.node !== node) before.node.replaceWith(node);
      else if (!before) this.container.append(node);
      this.shown[position] = { type: block.type, language: block.language, source: block.source, node };
    });
    for (const { node } of this.shown.splice(blocks.length)) node.remove();
  }

  /** Code that grows keeps its place, so that its button can be pressed and its lines scrolled meanwhile. */
  extend(before, block) {
    if (before?.type !== "code" || block.type !== "code" || before.language !== block.language) return null;
    before.node.querySelector("code").textContent = block.text;
    return before.node;
  }
}

const BUILDERS = {
  paragraph: (block) => element("p", { dir: "auto" }, inline(block.text)),
  heading: buildHeading,
  rule: () => element("hr"),
  quote: (block) => element("blockquote", { dir: directionOf(block.source) }, ...block.blocks.map(build)),
  code: buildCode,
  list: buildList,
  table: buildTable,
};

/** Of the first letter. A container's own `dir="auto"` overlooks parts that have one too. */
function directionOf(source) {
  const letter = /\p{L}/u.exec(source.replace(/`[^`]*`/g, ""))?.[0] ?? "";
  return RIGHT_TO_LEFT.test(letter) ? "rtl" : "ltr";
}

function build(block) {
  return BUILDERS[block.type](block);
}

/** The page's own headings are above these. */
function buildHeading(block) {
  const attributes = { dir: "auto", class: `level-${block.level}` };
  return element(`h${Math.min(block.level + 2, 6)}`, attributes, inline(block.text));
}

function buildCode(block) {
  const code = element("code", { dir: "ltr" }, block.text);
  const name = block.language ? `Copy the ${block.language} code` : "Copy the code";
  const button = copyButton(name, () => code.textContent);
  const head = element("figcaption", {}, element("span", {}, block.language || "text"), button);
  return element("figure", { class: "code" }, head, element("pre", {}, code));
}

function buildList(block) {
  const start = block.isOrdered && block.start !== 1 && `${block.start}`;
  const items = block.items.map((item) => buildItem(item, block.isLoose));
  return element(block.isOrdered ? "ol" : "ul", { start, dir: directionOf(block.source) }, ...items);
}

function buildItem({ blocks, isDone }, isLoose) {
  const children = blocks.map((child) => (child.type === "paragraph" && !isLoose ? inline(child.text) : build(child)));
  if (isDone === null) return element("li", {}, ...children);
  const name = isDone ? "done" : "not done";
  const box = element("input", { type: "checkbox", disabled: true, checked: isDone, "aria-label": name });
  return element("li", { class: "task" }, box, ...children);
}

function buildTable({ header, align, rows, source }) {
  const cell = (tag, text, column) => {
    const scope = tag === "th" && "col";
    return element(tag, { dir: "auto", class: align[column], scope }, inline(text));
  };
  const row = (tag, cells) => element("tr", {}, ...cells.map((text, column) => cell(tag, text, column)));
  const head = element("thead", {}, row("th", header));
  const body = element("tbody", {}, ...rows.map((cells) => row("td", cells)));
  return element("div", { class: "scroll" }, element("table", { dir: directionOf(source) }, head, body));
}
