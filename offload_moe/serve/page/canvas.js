// Drawing that is sharp on every screen, in the colours of the style sheet.

/** A canvas that fits its box. `draw(context, width, height)`, in CSS pixels, is called whenever something changes. */
export class Canvas {
  constructor(canvas, draw) {
    this.canvas = canvas;
    this.drawing = draw;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1;
    const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== across) this.canvas.width = across;
    if (this.canvas.height !== down) this.canvas.height = down;
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    this.drawing(context, width, height);
  }

  /** The value of a custom property such as `--hot`. */
  colour(name) {
    return getComputedStyle(this.canvas).getPropertyValue(name).trim();
  }
}
