// Markdown as nodes, kept up to date while its text grows: blocks whose source is the same stay as they are.

import { parseBlocks } from "./blocks.js";
import { copyButton, element } from "./dom.js";
import { inline } from "./inline.js";

const RIGHT_TO_LEFT = /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}\p{Script=Adlam}]/u;

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
  heading: (block) => element(`h${Math.min(block.level + 2, 6)}`, { dir: "auto", class: `level-${block.level}` }, inline(block.text)),
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

function buildCode(block) {
  const code = element("code", { dir: "ltr" }, block.text);
  const name = block.language ? `Copy the ${block.language} code` : "Copy the code";
  const head = element("figcaption", {}, element("span", {}, block.language || "text"), copyButton(name, () => code.textContent));
  return element("figure", { class: "code" }, head, element("pre", {}, code));
}

function buildList(block) {
  const list = element(block.isOrdered ? "ol" : "ul", { start: block.isOrdered && block.start !== 1 && `${block.start}`, dir: directionOf(block.source) });
  for (const item of block.items) {
    const children = item.blocks.flatMap((child) => (child.type === "paragraph" && !block.isLoose ? [inline(child.text)] : [build(child)]));
    const isTask = item.isDone !== null;
    const box = isTask ? element("input", { type: "checkbox", disabled: true, checked: item.isDone, "aria-label": item.isDone ? "done" : "not done" }) : null;
    list.append(element("li", { class: isTask && "task" }, box, ...children));
  }
  return list;
}

function buildTable(block) {
  const row = (tag, cells) =>
    element("tr", {}, ...cells.map((cell, column) => element(tag, { dir: "auto", class: block.align[column], scope: tag === "th" && "col" }, inline(cell))));
  const head = element("thead", {}, row("th", block.header));
  const body = element("tbody", {}, ...block.rows.map((cells) => row("td", cells)));
  return element("div", { class: "scroll" }, element("table", { dir: directionOf(block.source) }, head, body));
}
