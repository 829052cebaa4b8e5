// A cell for each expert of each layer: where it is, and how much it was used a moment ago.

import { Canvas } from "./canvas.js";

const TIERS = {
  0: ["--disk", "on disk only"],
  1: ["--ram", "in RAM"],
  2: ["--vram", "in VRAM"],
  3: ["--coming", "on its way"],
};
const COOLING = 0.55; // what is left of a cell's heat after one snapshot
const BAR = 6; // pixels that a bar needs
const [MIN_ROW, MAX_ROW, AIM] = [3, 16, 210]; // pixels

export class HeatMap {
  /** `readout` shows the cell under the pointer or the cursor; arrow keys move it. */
  constructor(canvas, readout) {
    this.residency = [];
    this.uses = [];
    this.heat = [];
    this.cursor = null; // [layer, expert]
    this.readout = readout;
    this.view = new Canvas(canvas, (context, width, height) => this.paint(context, width, height));
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.moveTo(null));
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("focus", () => this.moveTo(this.cursor ?? [0, 0]));
    canvas.addEventListener("blur", () => this.moveTo(null));
  }

  /** `activity`: 0 to 1 for each expert. */
  update(residency, uses, activity) {
    const previous = this.heat;
    this.residency = residency;
    this.uses = uses;
    const cooled = (layer, expert) => (previous[layer]?.[expert] ?? 0) * COOLING;
    this.heat = activity.map((row, layer) => row.map((heat, expert) => Math.max(heat, cooled(layer, expert))));
    const rows = residency.length;
    this.rowHeight = Math.min(MAX_ROW, Math.max(MIN_ROW, Math.floor(AIM / Math.max(1, rows))));
    this.view.canvas.style.height = `${rows * this.rowHeight}px`;
    this.columns = Math.max(0, ...residency.map((row) => row.length));
    if (this.cursor) this.moveTo(this.cursor);
    this.view.draw();
  }

  paint(context, width) {
    const colours = Object.fromEntries(Object.entries(TIERS).map(([tier, [name]]) => [tier, this.view.colour(name)]));
    const hot = this.view.colour("--hot");
    const gap = width / this.columns >= 4 ? 1 : 0;
    const rowGap = this.rowHeight >= 4 ? 1 : 0;
    this.residency.forEach((row, layer) => {
      for (let expert = 0; expert < row.length; expert += 1) {
        const [left, right] = [this.leftOf(expert, width), this.leftOf(expert + 1, width)];
        const [cellWidth, cellHeight] = [right - left - gap, this.rowHeight - rowGap];
        context.fillStyle = colours[row[expert]] ?? colours[0];
        context.fillRect(left, layer * this.rowHeight, cellWidth, cellHeight);
        const heat = this.heat[layer]?.[expert] ?? 0;
        if (heat > 0.03) this.paintHeat(context, hot, heat, left, layer * this.rowHeight, cellWidth, cellHeight);
      }
    });
    if (this.cursor) this.paintCursor(context, width);
  }

  /** A bar as long as the heat along the cell's longer side; a veil over a cell that has no room for one. */
  paintHeat(context, hot, heat, left, top, width, height) {
    context.fillStyle = hot;
    const thick = Math.max(2, Math.round(height * 0.4));
    if (width >= BAR) context.fillRect(left, top + Math.floor((height - thick) / 2), Math.max(1, width * heat), thick);
    else if (height >= BAR) context.fillRect(left, top + height * (1 - heat), width, height * heat);
    else {
      context.globalAlpha = heat;
      context.fillRect(left, top, width, height);
      context.globalAlpha = 1;
    }
  }

  paintCursor(context, width) {
    const [layer, expert] = this.cursor;
    const left = this.leftOf(expert, width);
    const across = Math.max(3, this.leftOf(expert + 1, width) - left - 1);
    context.strokeStyle = this.view.colour("--text");
    context.lineWidth = 2;
    context.strokeRect(left, layer * this.rowHeight, across, this.rowHeight - 1);
  }

  /** On whole pixels of the screen. */
  leftOf(expert, width) {
    const ratio = devicePixelRatio || 1;
    return Math.round(((expert * width) / this.columns) * ratio) / ratio;
  }

  point({ offsetX, offsetY, target }) {
    this.moveTo([Math.floor(offsetY / this.rowHeight), Math.floor((offsetX / target.clientWidth) * this.columns)]);
  }

  press(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [layer, expert] = this.cursor ?? [0, 0];
    this.moveTo([layer + step[0], expert + step[1]]);
  }

  moveTo(cursor) {
    if (cursor && this.residency.length) {
      const layer = Math.min(Math.max(0, cursor[0]), this.residency.length - 1);
      const expert = Math.min(Math.max(0, cursor[1]), this.residency[layer].length - 1);
      this.cursor = [layer, expert];
      const [, place] = TIERS[this.residency[layer][expert]] ?? TIERS[0];
      const uses = Math.round(this.uses[layer]?.[expert] ?? 0);
      this.readout.textContent = `Layer ${layer}, expert ${expert}: ${place}, used ${uses} ×`;
    } else {
      this.cursor = null;
      this.readout.textContent = "";
    }
    this.view.draw();
  }
}
