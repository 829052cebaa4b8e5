// The live panel: the hierarchy of disk, RAM and VRAM at work, out of snapshots of the server.

import { element, show } from "./dom.js";
import { activity, between, tiersOf } from "./figures.js";
import { bytes, count, milliseconds, number, percent } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { Line, Stack } from "./plots.js";

const WINDOW = 5; // steps between snapshots over which a figure is taken: one second is too short for slow models
const FIGURES = [
  ["Tokens per second", "tokensPerS", number],
  ["Expert hits", "hitRate", percent],
  ["Stall per token", "stallMs", milliseconds],
  ["Read from disk", "diskPerS", (value) => `${bytes(value)}/s`],
];
const COLOURS = { hits: "ram", delayed: "coming", misses: "hot" };
const PARTS = Object.keys(COLOURS);
const TIERS = [
  ["2", "vram", "VRAM"],
  ["1", "ram", "RAM"],
  ["3", "coming", "on its way"],
  ["0", "disk", "disk"],
];

/** Shows snapshots in `container`. */
export class Live {
  constructor(container) {
    this.last = null;
    this.busy = []; // the newest snapshots between which the server has worked
    this.figures = FIGURES.map(([label, name, format]) => new Figure(label, name, format));
    const stack = element("canvas", { class: "stack", role: "img", "aria-label": "Experts per token, newest right" });
    this.stack = new Stack(stack, PARTS.map((name) => `--${COLOURS[name]}`));
    this.perToken = element("ul", { class: "legend" });
    this.map = element("canvas", { class: "map", tabindex: "0", role: "img", "aria-describedby": "cell" });
    const readout = element("output", { id: "cell" });
    this.tiers = element("ul", { class: "legend" });
    this.heatmap = new HeatMap(this.map, readout);
    this.empty = element("p", { class: "quiet-text" });
    const title = element("div", { class: "title-row" }, element("h3", {}, "Experts"), readout);
    this.memory = element("div");
    this.requests = element("div");
    this.container = container;
    this.parts = [
      element("dl", { class: "figures" }, ...this.figures.map((figure) => figure.element)),
      element("section", {}, title, this.empty, this.map, this.tiers),
      part("Experts per token", stack, this.perToken),
      part("Memory", this.memory),
      part("Requests", this.requests),
    ];
    show(container, element("p", { class: "quiet-text" }, "No server has answered yet."));
  }

  update(live) {
    const last = this.last;
    if (!last) show(this.container, ...this.parts);
    const step = between(last, live);
    this.last = live;
    if (!step || !isBusy(step, last, live)) this.busy = [];
    else this.busy = [...(this.busy.length ? this.busy : [last]), live].slice(-WINDOW - 1);
    const span = between(this.busy[0], live);
    if (step) {
      for (const figure of this.figures) figure.add(step, span);
      this.stack.add(PARTS.map((name) => step[name]));
    }
    this.showPerToken(span);
    this.showExperts(live, step ? last : null);
    show(this.memory, ...memoryOf(live));
    show(this.requests, ...requestsOf(live));
  }

  showPerToken(span) {
    if (!span?.tokens && this.perToken.childElementCount) return;
    const row = (name) => element("li", {}, swatch(COLOURS[name]), `${number(span ? span[name] : NaN)} ${name}`);
    show(this.perToken, ...PARTS.map(row));
  }

  showExperts(live, last) {
    const isLoaded = live.residency.length > 0;
    this.empty.hidden = isLoaded;
    const isLoading = live.state === "loading";
    this.empty.textContent = isLoading ? "The model is being loaded." : "The next message loads the model.";
    for (const shown of [this.map, this.tiers]) shown.hidden = !isLoaded;
    if (!isLoaded) return;
    this.heatmap.update(live.residency, live.uses, activity(last, live));
    const counts = tiersOf(live.residency);
    const present = TIERS.filter(([tier, name]) => counts[tier] || live.slots[name]);
    const words = present.map(([tier, , label]) => `${(counts[tier] ?? 0).toLocaleString("en")} ${label}`);
    this.map.setAttribute("aria-label", `${count(live.residency.length, "layer")} of experts: ${words.join(", ")}`);
    show(
      this.tiers,
      ...present.map(([, name], position) => element("li", {}, swatch(name), words[position])),
      element("li", {}, swatch("hot"), "used now"),
    );
  }
}

/** One value, with its plot. What is idle keeps its last value, dimmed. */
class Figure {
  constructor(label, name, format) {
    this.name = name;
    this.format = format;
    const canvas = element("canvas", { "aria-hidden": "true" });
    this.line = new Line(canvas);
    this.value = element("dd", {}, "–");
    this.element = element("div", {}, element("dt", {}, label), this.value, canvas);
  }

  add(step, span) {
    this.element.classList.toggle("idle", !span);
    if (Number.isFinite(span?.[this.name])) this.value.textContent = this.format(span[this.name]);
    this.line.add(step[this.name]);
  }
}

/** The step in which a request begins is not one of the others: most of it is idle. */
function isBusy(step, last, live) {
  return last.running.length > 0 ? step.tokens > 0 || live.running.length > 0 : step.tokens > 0 && !live.running.length;
}

function part(title, ...children) {
  return element("section", {}, element("h3", {}, title), ...children);
}

function swatch(name) {
  return element("span", { class: `swatch ${name}`, "aria-hidden": "true" });
}

function memoryOf({ memory, budget, slots, prefixes }) {
  const parts = Object.entries(memory).filter(([, size]) => size > 0);
  const total = parts.reduce((sum, [, size]) => sum + size, 0);
  const bar = element("div", { class: "bar", "aria-hidden": "true" });
  const list = element("ul", { class: "parts" });
  let others = 0;
  parts.forEach(([name, size]) => {
    const colour = /\bVRAM$/.test(name) ? "vram" : /\bRAM$/.test(name) ? "ram" : `part-${others++ % 4}`;
    const segment = swatch(colour);
    segment.style.flexGrow = `${size / Math.max(1, total)}`;
    bar.append(segment);
    list.append(element("li", {}, swatch(colour), element("span", {}, name), element("span", {}, bytes(size))));
  });
  const facts = [["in all", bytes(total)]];
  for (const [place, name] of [["RAM", "ram"], ["VRAM", "vram"]]) {
    if (budget[name]) facts.push([`${place} to use`, bytes(budget[name])]);
    if (slots[name]) facts.push([`${place} slots full`, `${slots[name].resident} of ${slots[name].slots}`]);
  }
  if (prefixes.kept) facts.push([`${count(prefixes.kept, "conversation")} kept`, count(prefixes.tokens, "token")]);
  return [bar, list, element("ul", { class: "parts facts" }, ...facts.map(([name, value]) => row(name, value)))];
}

function row(...words) {
  return element("li", {}, ...words.map((each) => element("span", {}, each)));
}

function requestsOf({ running, requests }) {
  const line = (request) => {
    const isPrompt = request.phase === "prompt";
    const words = isPrompt
      ? `prompt, ${request.prompt_done.toLocaleString("en")} of ${count(request.prompt_tokens, "token")}`
      : `answer, ${count(request.generated, "token")}`;
    return row(words, `${number(request.age_s)} s`);
  };
  const others = ["waiting", "cancelled", "refused"].filter((name) => requests[name]);
  const facts = [`${requests.finished} answered`, ...others.map((name) => `${requests[name]} ${name}`)];
  const list = element("ul", { class: "parts" }, ...running.map(line));
  return [list, element("p", { class: "quiet-text" }, facts.join(" · "))];
}
