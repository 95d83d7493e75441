// Play (the window slides over the map) and Try (another window on a copy of the step).

import { writer } from "neocog/colours";
import { h } from "neocog/elements";
import { layout } from "neocog/map";
import { bitmap, draw } from "neocog/plane";
import { label, title } from "neocog/texts";
import { formula, outSize, taps } from "neocog/window";

// ----------------------------------------------------------------------------------- play

export class Player {
  constructor(page) {
    this.page = page;
    this.timer = null;
    this.speed = 6; // outputs a second
  }

  get playing() {
    return this.timer !== null;
  }

  /** Moves by some outputs, left to right and top to bottom, and fills the map up to there. */
  step(by) {
    const { scene, state } = this.page;
    const [, height, width] = scene.boxes[state.box].size;
    const at = Math.min(Math.max(state.y * width + state.x + by, 0), height * width - 1);
    this.page.go({ y: Math.floor(at / width), x: at % width, filled: at + 1, held: true });
    if (at === height * width - 1) this.stop();
  }

  start() {
    const { scene, state } = this.page;
    const [, height, width] = scene.boxes[state.box].size;
    const done = state.y * width + state.x >= height * width - 1;
    if (state.filled === null || done) this.page.go({ y: 0, x: 0, filled: 1, held: true });
    const tick = () => {
      this.step(1);
      if (this.timer !== null) this.timer = setTimeout(tick, 1000 / this.speed);
    };
    this.timer = setTimeout(tick, 1000 / this.speed);
    this.page.refreshTools();
  }

  stop() {
    if (this.timer === null) return;
    clearTimeout(this.timer);
    this.timer = null;
    this.page.refreshTools();
  }
}

export function playTools(page) {
  const { t, player, state } = page;
  if (layout(page.scene.boxes[state.box]).vector) return [];
  const button = (key, words, sign, onclick) => h("button", { type: "button", class: "tool", "data-key": key, "aria-label": words, title: words, onclick }, sign);
  return h("div", { class: "play", role: "group", "aria-label": t.play },
    button("back", t.back, "◀", () => { player.stop(); player.step(-1); }),
    h("button", { type: "button", class: "tool wide", "data-key": "play", "data-playing": String(player.playing), onclick: () => (player.playing ? player.stop() : player.start()) }, player.playing ? `❚❚ ${t.pause}` : `▶ ${t.play}`),
    button("next", t.next, "▶|", () => { player.stop(); player.step(1); }),
    h("button", { type: "button", class: "tool wide", "data-key": "whole", disabled: state.filled === null, onclick: () => { player.stop(); page.go({ filled: null }); } }, t.whole),
    h("label", { class: "speed" }, t.speed, h("input", { type: "range", min: "0", max: "6", step: "0.5", value: String(Math.log2(player.speed)), "data-key": "speed", "aria-valuetext": `${player.speed.toFixed(0)} / s`,
      oninput: (event) => {
        player.speed = 2 ** Number(event.target.value);
        event.target.setAttribute("aria-valuetext", `${player.speed.toFixed(0)} / s`);
      } })));
}

// ------------------------------------------------------------------------------------ try

/** The step that can be tried: the one chosen if it has a window, else the head of its block. */
function trialBox(page) {
  const { scene, state } = page;
  const block = scene.blocks[scene.boxes[state.box].block];
  const windows = [state.box, ...block.boxes].map((index) => scene.boxes[index]);
  return windows.find((box) => box.rows) ?? null;
}

export function tryTools(page) {
  const { t } = page;
  const box = trialBox(page);
  if (!box) return [];
  const settings = page.trial?.box === box.index ? page.trial : ownSettings(box);
  page.trial = settings;
  const run = () => compute(page, box, settings, out).catch((error) => page.failed(error));
  const field = (name, least, most) => h("label", {}, t[name === "size" ? "kernelSize" : name],
    h("input", { type: "number", min: least, max: most, value: settings[name], "data-key": `try-${name}`, inputmode: "numeric",
      oninput: (event) => {
        const value = event.target.value === "" ? NaN : Number(event.target.value);
        if (Number.isInteger(value) && value >= least && value <= most) { settings[name] = value; run(); }
      } }));
  const out = h("div", { class: "trial" });
  run();
  return [
    h("h2", {}, t.trying, h("small", {}, ` ${label(box, t)} · ${title(box, t)}`)),
    h("p", { class: "hint" }, t.tryHint),
    h("div", { class: "fields" }, field("size", 1, 15), field("stride", 1, 9), field("padding", 0, 9),
      box.mode === "mean" ? null : field("dilation", 1, 9),
      h("button", { type: "button", class: "more", "data-key": "try-reset", onclick: () => { page.trial = null; page.refreshTools(); } }, t.reset)),
    out,
  ];
}

function ownSettings(box) {
  return { box: box.index, size: box.rows.size, stride: box.rows.stride, padding: box.rows.low, dilation: box.rows.dilation };
}

async function compute(page, box, settings, out) {
  const { scene, t, state } = page;
  const source = scene.boxes[box.inputs[0]];
  const [, height, width] = source.size;
  // what was not changed stays as it is along both axes
  const own = ownSettings(box);
  const changed = (axis) => ({
    ...axis,
    ...Object.fromEntries(["size", "stride", "dilation"].filter((name) => settings[name] !== own[name]).map((name) => [name, settings[name]])),
    ...(settings.padding === own.padding ? {} : { low: settings.padding, high: settings.padding }),
  });
  const [rows, cols] = [changed(box.rows), changed(box.cols)];
  const turn = (out.turn = (out.turn ?? 0) + 1);
  const size = [outSize(rows, height), outSize(cols, width)];
  const lines = [formula(rows, height), formula(cols, width)].filter((line, i, all) => all.indexOf(line) === i);
  const formulas = lines.map((line) => h("code", { class: "formula" }, line));
  if (Math.min(...size) < 1) {
    out.replaceChildren(h("p", { class: "bad" }, t.noFit(lines.join(", "))));
    return;
  }
  const input = await scene.map(source.index);
  const kernel = box.kind === "conv" ? await scene.kernel(box.index, state.channel) : null;
  if (turn !== out.turn) return; // another window by now
  if (!input?.exact || (box.kind === "conv" && !kernel)) {
    out.replaceChildren(...formulas, h("p", { class: "note" }, t.missing));
    return;
  }
  const values = box.kind === "conv"
    ? convolved(box, input.values, source.size, kernel, state.channel, rows, cols)
    : poolOf(box, input.values, source.size, state.channel, rows, cols);
  const largest = values.reduce((most, v) => (Number.isFinite(v) ? Math.max(most, Math.abs(v)) : most), 0) || 1;
  const canvas = h("canvas", { class: "trial-map", role: "img", "aria-label": `${size.join("×")}` });
  const cell = Math.min(16, 220 / Math.max(...size));
  draw(canvas, bitmap(values, size[0], size[1], (v) => v / largest, page.theme), { height: size[0], width: size[1], cell, palette: page.palette });
  out.dataset.values = values.length <= 4096 ? JSON.stringify([...values]) : "";
  out.replaceChildren(...formulas, h("p", {}, `${t.trySize} ${size.join("×")} (${t.was} ${box.size.slice(1).join("×")})`), canvas,
    h("p", { class: "note" }, `± ${writer([largest])(largest)}`));
}

/** The kernel in another size: cut, or with zeros around it. */
function resized(kernel, [channels, kh, kw], [rows, cols]) {
  const found = new Float64Array(channels * rows * cols);
  const [top, left] = [Math.floor((rows - kh) / 2), Math.floor((cols - kw) / 2)];
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < cols; x++) {
        const [ky, kx] = [y - top, x - left];
        if (ky >= 0 && ky < kh && kx >= 0 && kx < kw) found[(c * rows + y) * cols + x] = kernel[(c * kh + ky) * kw + kx];
      }
    }
  }
  return found;
}

/** One channel of a convolution under other windows, without what follows it. */
function convolved(box, input, size, kernel, channel, rows, cols) {
  const [perGroup, ...window] = box.kernel.shape.slice(1);
  const weights = resized(kernel, [perGroup, ...window], [rows.size, cols.size]);
  const first = Math.floor(channel / (box.kernel.shape[0] / box.groups)) * perGroup;
  const bias = box.bias ? box.bias[channel] : 0;
  return over(size, rows, cols, (ys, xs) => {
    let sum = bias;
    for (let c = 0; c < perGroup; c++) {
      for (const row of ys) {
        for (const col of xs) sum += input[((first + c) * size[1] + row.i) * size[2] + col.i] * weights[(c * rows.size + row.k) * cols.size + col.k];
      }
    }
    return sum;
  });
}

/** One channel of a pool under other windows. */
function poolOf(box, input, size, channel, rows, cols) {
  return over(size, rows, cols, (ys, xs, counted) => {
    let best = -Infinity, sum = 0;
    for (const row of ys) {
      for (const col of xs) {
        const value = input[(channel * size[1] + row.i) * size[2] + col.i];
        if (value > best || Number.isNaN(value)) best = value;
        sum += value;
      }
    }
    if (box.mode === "max") return best;
    return sum / (box.divisor ?? (box.countPadding ? counted : ys.length * xs.length));
  });
}

/** One value for each place of the windows, from the taps that lie on the map. */
function over([, height, width], rows, cols, value) {
  const [down, across] = [outSize(rows, height), outSize(cols, width)];
  const found = new Float64Array(down * across);
  for (let y = 0; y < down; y++) {
    const ys = taps(rows, y, height);
    for (let x = 0; x < across; x++) {
      const xs = taps(cols, x, width);
      const counted = ys.filter((row) => row.padded).length * xs.filter((col) => col.padded).length;
      found[y * across + x] = value(ys.filter((row) => row.on), xs.filter((col) => col.on), counted);
    }
  }
  return found;
}
