// Small plots of the last minutes: one value as a line, several as a stack. The newest is at the right.

import { Canvas } from "./canvas.js";

export const LENGTH = 90; // snapshots

/** `values` may contain NaN: there the line is interrupted. */
export class Line {
  constructor(canvas) {
    this.values = [];
    this.view = new Canvas(canvas, (context, width, height) => this.paint(context, width, height));
  }

  add(value) {
    this.values = [...this.values, value].slice(-LENGTH);
    this.view.draw();
  }

  paint(context, width, height) {
    const most = Math.max(1e-9, ...this.values.filter(Number.isFinite));
    const step = width / (LENGTH - 1);
    context.strokeStyle = this.view.colour("--accent");
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.beginPath();
    let isDrawn = false;
    this.values.forEach((value, position) => {
      const x = width - (this.values.length - 1 - position) * step;
      const y = height - 1.5 - (value / most) * (height - 3);
      if (!Number.isFinite(value)) isDrawn = false;
      else if (isDrawn) context.lineTo(x, y);
      else {
        context.moveTo(x - step / 2, y);
        context.lineTo(x, y);
        isDrawn = true;
      }
    });
    context.stroke();
  }
}

/** Rows of values that lie on each other, each in the colour of its custom property. */
export class Stack {
  constructor(canvas, colours) {
    this.rows = [];
    this.colours = colours;
    this.view = new Canvas(canvas, (context, width, height) => this.paint(context, width, height));
  }

  add(row) {
    this.rows = [...this.rows, row].slice(-LENGTH);
    this.view.draw();
  }

  paint(context, width, height) {
    const sums = this.rows.map((row) => row.reduce((sum, value) => sum + (value || 0), 0));
    const most = Math.max(1e-9, ...sums);
    const step = width / LENGTH;
    const colours = this.colours.map((name) => this.view.colour(name));
    this.rows.forEach((row, position) => {
      const left = width - (this.rows.length - position) * step;
      let bottom = height;
      row.forEach((value, part) => {
        const tall = ((value || 0) / most) * height;
        context.fillStyle = colours[part];
        context.fillRect(left, bottom - tall, Math.max(1, step - 0.5), tall);
        bottom -= tall;
      });
    });
  }
}
