// A pad to draw on, and what a model makes of it.
//
//   const drawing = new Drawing(); drawing.offer(models);

import { leading } from "./catalogue.js";
import { byId, element, fillSelect, showProblem } from "./dom.js";
import { postJson } from "./gateway.js";
import { addSnippets, asCurl, asHttpxPython } from "./snippets.js";
import { paint, rasterise, toPicture } from "./strokes.js";

const STEP = 1 / 24;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Drawing {
  constructor() {
    this.pad = byId("pad");
    this.models = new Map();
    this.asked = 0;
    this.pad.addEventListener("pointerdown", (event) => this.press(event));
    this.pad.addEventListener("pointermove", (event) => this.move(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      this.pad.addEventListener(kind, (event) => this.lift(event));
    }
    this.pad.addEventListener("keydown", (event) => this.steer(event));
    this.pad.addEventListener("focus", () => this.paint());
    this.pad.addEventListener("blur", () => this.paint());
    new ResizeObserver(() => this.paint()).observe(this.pad);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
    byId("clear-pad").addEventListener("click", () => this.clear());
    byId("fit").addEventListener("change", () => this.ask());
    byId("picture-model").addEventListener("change", () => this.ask());
    addSnippets(byId("picture-snippets"), {
      curl: () => this.snippet(asCurl),
      Python: () => this.snippet(asHttpxPython),
    });
    this.clear();
  }

  // Takes the models that know pictures.
  offer(models) {
    const known = models.filter((model) => leading(model)?.picture);
    this.models = new Map(known.map((model) => [model.id, leading(model).picture]));
    byId("draw-none").hidden = known.length > 0;
    byId("draw-tools").hidden = known.length === 0;
    if (fillSelect(byId("picture-model"), [...this.models.keys()])) this.ask();
    if (!known.length) this.clear();
  }

  clear() {
    this.strokes = [];
    this.cursor = [0.5, 0.5];
    this.isDown = false;
    this.paint();
    this.ask();
  }

  press(event) {
    if (event.button !== 0) return;
    this.pad.setPointerCapture(event.pointerId);
    this.strokes.push([this.pointOf(event)]);
    this.paint();
  }

  move(event) {
    if (!this.pad.hasPointerCapture(event.pointerId)) return;
    for (const part of event.getCoalescedEvents?.() ?? []) this.extend(this.pointOf(part));
    this.extend(this.pointOf(event));
  }

  lift(event) {
    if (!this.pad.hasPointerCapture(event.pointerId)) return;
    this.pad.releasePointerCapture(event.pointerId);
    this.ask();
  }

  steer(event) {
    if (event.key === "Escape") {
      this.clear();
    } else if (event.key === " ") {
      this.isDown = !this.isDown;
      if (this.isDown) this.strokes.push([[...this.cursor]]);
      this.paint();
      this.ask();
    } else if (event.key in ARROWS) {
      const towards = ARROWS[event.key];
      this.cursor = this.cursor.map((value, axis) => (
        Math.min(1, Math.max(0, value + STEP * towards[axis]))));
      if (this.isDown) this.extend([...this.cursor]);
      this.paint();
    } else {
      return;
    }
    event.preventDefault();
  }

  extend(point) {
    this.strokes.at(-1).push(point);
    this.paint();
  }

  pointOf({ clientX, clientY }) {
    const box = this.pad.getBoundingClientRect();
    return [(clientX - box.left) / box.width, (clientY - box.top) / box.height];
  }

  paint() {
    const size = Math.round(this.pad.clientWidth * devicePixelRatio);
    if (!size) return;
    this.pad.width = this.pad.height = size;
    const context = this.pad.getContext("2d");
    const { color, accentColor } = getComputedStyle(this.pad);
    paint(context, this.strokes, { size, color });
    if (document.activeElement !== this.pad || !this.pad.matches(":focus-visible")) return;
    const [x, y] = this.cursor.map((value) => value * size);
    context.lineWidth = 2 * devicePixelRatio;
    context.strokeStyle = accentColor;
    context.beginPath();
    context.arc(x, y, size * (this.isDown ? 0.03 : 0.05), 0, 2 * Math.PI);
    context.stroke();
  }

  // The request for what is drawn, and the picture in it.
  request() {
    const picture = this.models.get(byId("picture-model").value);
    const values = rasterise(this.strokes, {
      width: picture.width,
      height: picture.height,
      isDarkOnLight: picture.is_dark_on_light,
      fits: byId("fit").checked,
    });
    const canvas = toPicture(values, picture, byId("seen"));
    const data = canvas.toDataURL("image/png").split(",")[1];
    return {
      inputs: [{ name: picture.input, datatype: "BYTES", shape: [1], data: [data] }],
      outputs: [{ name: picture.probabilities }],
    };
  }

  get path() {
    return `/v2/models/${byId("picture-model").value}/infer`;
  }

  snippet(write) {
    return write(location.origin + this.path, this.request());
  }

  async ask() {
    const asked = this.asked += 1;
    const picture = this.models.get(byId("picture-model").value);
    if (!picture) return;
    showProblem(byId("draw-problem"), "");
    const request = this.request();
    if (!this.strokes.length) {
      this.show(picture, picture.labels.map(() => 0));
      byId("guess").textContent = "Draw something";
      byId("guess-note").textContent = `Scaled down to ${picture.width} × ${picture.height} here, in the browser`;
      return;
    }
    const startedAt = performance.now();
    try {
      const answer = await postJson(this.path, request);
      if (asked !== this.asked) return; // overtaken by a newer drawing
      const probabilities = answer.outputs[0].data;
      const best = probabilities.indexOf(Math.max(...probabilities));
      this.show(picture, probabilities, best);
      byId("guess").textContent = `${labelOf(picture, best)}, ${(100 * probabilities[best]).toFixed(1)} %`;
      byId("guess-note").textContent = `${answer.model_name}/${answer.model_version}, `
        + `${(performance.now() - startedAt).toFixed(0)} ms`;
    } catch (error) {
      if (asked === this.asked) showProblem(byId("draw-problem"), error.message);
    }
  }

  // Moves the bars there are, where they are of the same classes.
  show(picture, probabilities, best) {
    const bars = byId("bars");
    const labels = probabilities.map((_, index) => labelOf(picture, index));
    if ([...bars.children].map((bar) => bar.firstChild.textContent).join("\n") !== labels.join("\n")) {
      bars.replaceChildren(...labels.map((label) => element("li", {},
        element("span", { class: "label" }, label),
        element("span", { class: "track" }, element("span", { class: "fill" })),
        element("span", { class: "value" }))));
    }
    probabilities.forEach((probability, index) => {
      const bar = bars.children[index];
      bar.classList.toggle("best", index === best);
      bar.querySelector(".fill").style.width = `${100 * probability}%`;
      bar.querySelector(".value").textContent = `${(100 * probability).toFixed(1)} %`;
    });
  }
}

const labelOf = (picture, index) => picture.labels[index] ?? String(index);
