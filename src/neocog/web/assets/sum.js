// The arithmetic of one value, written out: window × kernel = products, sums, bias, activation, pool.

import { colour, ink, writer } from "neocog/colours";
import { fill, h } from "neocog/elements";
import { draw } from "neocog/plane";
import { label, title } from "neocog/texts";
import { outSize } from "neocog/window";

const FEW = 4; // input channels that are drawn before one asks for all
const WIDEST = 7; // cells of a window that is drawn; of wider ones the largest products are listed
const LISTED = 12;
const MAP = 108; // CSS pixels of an input map

export function arithmetic(page, steps) {
  const { t, state, scene } = page;
  const value = steps.at(-1);
  const box = scene.boxes[state.box];
  const where = h("p", { class: "where" }, `${label(box, t)} · ${title(box, t)} · ${t.place(state.channel, state.y, state.x)}`);
  if (value.kind === "missing") return [where, missing(page)];
  const computed = !["image", "plain"].includes(value.kind);
  return [where, computed ? [ledger(page, steps), check(page, value)] : null,
    steps.map((step) => DRAWN[step.kind]?.(page, step) ?? passed(page, step))];
}

function missing(page) {
  const { t, scene } = page;
  const command = scene.command ? [h("p", {}, t.serveBy), h("pre", {}, h("code", {}, scene.command)), h("p", {}, t.orLayers)] : null;
  return h("div", { class: "missing" }, h("p", {}, t.missing), command);
}

const DRAWN = {
  conv: convolution,
  linear: weighted,
  pool: pooling,
  image: () => null,
  plain: (page, step) => h("div", { class: "step" }, h("p", { class: "note" }, page.t.unknown)),
};

function heading(page, step, more) {
  const { t, scene } = page;
  const box = scene.boxes[step.box];
  return h("h3", {}, title(box, t), h("small", {}, ` ${t.at(step.y, step.x)}`, more ? ` · ${more}` : ""));
}

/** A step that changes or passes on one value. */
function passed(page, step) {
  const { t } = page;
  const from = step.from && page.scene.boxes[step.from.index].block !== page.scene.boxes[step.box].block;
  const partner = step.partner;
  if (!from && !partner) return null;
  return h("div", { class: "step" }, heading(page, step),
    from ? h("p", {}, `${t.comesFrom} `, link(page, step.from)) : null,
    partner ? h("p", {}, `${t.other} `, link(page, partner)) : null);
}

/** A button that leads to a value elsewhere in the network. */
function link(page, { index, channel, y, x }) {
  const { t, scene } = page;
  const box = scene.boxes[index];
  return h("button", {
    type: "button", class: "link", "data-key": `link-${index}`,
    onclick: () => page.go({ box: index, channel, y, x, held: true }),
  }, `${label(box, t)} (${title(box, t)}), ${t.place(channel, y, x)}`);
}

// ------------------------------------------------------------------------------- convolution

/** The few input channels that add most, those first; all in order if there are no more. */
function heaviest(channels) {
  if (channels.length <= FEW) return channels;
  const size = ({ sum }) => (Number.isNaN(sum) ? Infinity : Math.abs(sum));
  return [...channels].sort((a, b) => size(b) - size(a)).slice(0, FEW);
}

function convolution(page, step) {
  const { t, state, scene } = page;
  const shown = state.all ? step.channels : heaviest(step.channels);
  const hidden = step.channels.length - shown.length;
  const wide = Math.max(step.rows.length, step.cols.length) > WIDEST;
  const padded = step.channels[0].cells.some((cell) => !cell.on);
  const sums = writer(step.channels.map((channel) => channel.sum));
  const source = scene.boxes[scene.boxes[step.box].inputs[0]];
  return h("div", { class: "step" }, heading(page, step),
    hidden ? allInputs(page, step, source) : null,
    shown.map((channel) => h("div", { class: "term", "data-input": channel.index },
      h("h4", {}, source.kind === "image" && source.size[0] === 3 ? `${t.inputChannel(channel.index)} (${"RGB"[channel.index]})` : t.inputChannel(channel.index),
        h("small", {}, ` ${t.adds} `, h("b", { class: "term-sum" }, sums(channel.sum)))),
      h("div", { class: "products" },
        inputMap(page, step, source, channel.index),
        wide ? list(page, step, channel) : tables(page, step, channel)))),
    padded ? h("p", { class: "note" }, h("span", { class: "cell padding" }), ` ${t.paddingZero}`) : null,
    step.channels.length > FEW ? h("button", {
      type: "button", class: "more", "data-key": "all", "aria-expanded": state.all ? "true" : "false",
      onclick: () => page.go({ all: !state.all }),
    }, state.all ? t.showFew : `${t.hidden(hidden)}: ${t.showHidden}`) : null);
}

const SMALL = 44; // CSS pixels of an input map among many
const MANY = 64; // of them

/** All input channels small, each with the window on it; a click leads to the channel. */
function allInputs(page, step, source) {
  const { t } = page;
  const [, height, width] = source.size;
  const channels = step.channels.slice(0, MANY).map((channel) => channel.index);
  const across = Math.min(channels.length, 8);
  const edge = SMALL + 4;
  const dense = window.devicePixelRatio || 1;
  const down = Math.ceil(channels.length / across);
  const canvas = h("canvas", {
    class: "inputs", role: "img", "aria-label": t.allInputs(channels.length, step.channels.length),
    title: t.allInputs(channels.length, step.channels.length),
    width: across * edge * dense, height: down * edge * dense, style: `width:${across * edge}px`,
    onclick: (event) => {
      const scale = canvas.clientWidth / across;
      const at = Math.floor(event.offsetY / scale) * across + Math.floor(event.offsetX / scale);
      if (channels[at] !== undefined) goToWindow(page, step, source, channels[at]);
    },
  });
  const context = canvas.getContext("2d");
  context.scale(dense, dense);
  const cell = SMALL / Math.max(height, width);
  const [y0, x0] = [step.rows[0].i, step.cols[0].i];
  const [y1, x1] = [step.rows.at(-1).i + 1, step.cols.at(-1).i + 1];
  page.scene.picture(source.index).then(({ values }) => {
    context.imageSmoothingEnabled = cell < 1;
    channels.forEach((channel, i) => {
      const [left, top] = [(i % across) * edge + 2, Math.floor(i / across) * edge + 2];
      context.drawImage(page.bitmapOf(source, channel, values), left, top, width * cell, height * cell);
      for (const [colour, line] of [[page.palette.halo, 3], [page.palette.mark, 1.5]]) {
        context.strokeStyle = colour;
        context.lineWidth = line;
        context.strokeRect(left + x0 * cell, top + y0 * cell, (x1 - x0) * cell, (y1 - y0) * cell);
      }
    });
  }).catch((error) => page.failed(error));
  return canvas;
}

function tables(page, step, channel) {
  const { t } = page;
  const { cells } = channel;
  const axes = { rows: step.rows.map((row) => row.i), cols: step.cols.map((col) => col.i) };
  const plain = cells.map((cell) => ({ ...cell, on: true }));
  return [
    table(page, t.patch, cells, "input", axes),
    h("span", { class: "sign", "aria-hidden": "true" }, "×"),
    table(page, t.kernel, plain, "weight", { rows: step.rows, cols: step.cols }, false),
    h("span", { class: "sign", "aria-hidden": "true" }, "="),
    table(page, t.products, cells, "product", { rows: step.rows, cols: step.cols }, false),
  ];
}

/** A window as a table, a colour and a number in each cell. */
function table(page, caption, cells, name, { rows, cols }, labels = true, winner = null) {
  const write = writer(cells.filter((cell) => cell.on).map((cell) => cell[name]));
  const largest = Math.max(...cells.map((cell) => Math.abs(cell[name])).filter(Number.isFinite), 0) || 1;
  const body = rows.map((row, r) => h("tr", {},
    labels ? h("th", { scope: "row" }, row) : null,
    cols.map((_, c) => {
      const at = r * cols.length + c;
      const cell = cells[at];
      if (!cell.on) return h("td", { class: "cell padding", "aria-label": page.t.padding }, cell.padded === false ? "" : "0");
      const back = colour(cell[name] / largest, page.theme);
      return h("td", {
        class: at === winner ? "cell winner" : "cell", style: `background:rgb(${back});color:${ink(back)}`,
        "data-value": cell[name],
      }, write(cell[name]), at === winner ? h("span", { class: "star", "aria-label": page.t.largest }, "★") : null);
    })));
  const head = labels ? h("tr", {}, h("td", {}), cols.map((col) => h("th", { scope: "col" }, col))) : null;
  const made = h("table", { class: `window ${name}` }, h("caption", {}, caption), h("tbody", {}, head, body));
  return h("div", { class: "scroll" }, made);
}

/** The products that weigh most, for windows too wide to draw. */
function list(page, step, channel) {
  const cells = channel.cells.map((cell, at) => ({
    ...cell, where: page.t.at(step.rows[Math.floor(at / step.cols.length)].i, step.cols[at % step.cols.length].i),
  }));
  return terms(page, cells);
}

function terms(page, cells) {
  const order = cells.filter((cell) => cell.on).sort((a, b) => Math.abs(b.product) - Math.abs(a.product)).slice(0, LISTED);
  const [input, weight, product] = ["input", "weight", "product"].map((name) => writer(cells.map((cell) => cell[name])));
  return h("div", { class: "list" }, h("p", { class: "note" }, page.t.list(order.length)),
    h("table", {}, h("tbody", {}, order.map((cell) => h("tr", {},
      h("th", { scope: "row" }, cell.link?.() ?? cell.where),
      h("td", {}, input(cell.input)), h("td", {}, "×"), h("td", {}, weight(cell.weight)),
      h("td", {}, "="), h("td", {}, product(cell.product)))))));
}

/** A fully connected layer: its largest products. */
function weighted(page, step) {
  const { t, scene } = page;
  const index = scene.boxes[step.box].inputs[0];
  const cells = step.channels.map(({ cells: [cell], index: channel }) => ({
    ...cell, link: () => inputLink(page, index, channel, t.inputNumber(channel)),
  }));
  return h("div", { class: "step" }, h("h3", {}, t.linear), terms(page, cells));
}

function inputLink(page, index, channel, text) {
  return h("button", {
    type: "button", class: "link", "data-key": `input-${channel}`,
    onclick: () => page.go({ box: index, channel, y: 0, x: 0, held: true }),
  }, text);
}

/** The map that a step reads, with its window on it. */
function inputMap(page, step, source, channel, winner = null) {
  const { scene } = page;
  const [, height, width] = source.size;
  const reader = scene.boxes[step.box];
  const inside = (axis) => [axis[0].i, axis.at(-1).i];
  const [[y0, y1], [x0, x1]] = [inside(step.rows), inside(step.cols)];
  const pad = {
    top: Math.max(reader.rows.low, -y0), bottom: Math.max(reader.rows.high, y1 - height + 1),
    left: Math.max(reader.cols.low, -x0), right: Math.max(reader.cols.high, x1 - width + 1),
  };
  const across = Math.max(height + pad.top + pad.bottom, width + pad.left + pad.right);
  const cell = across <= MAP ? Math.min(Math.floor(MAP / across), 16) : MAP / across;
  const starts = (window, n) => Array.from({ length: Math.max(outSize(window, n), 0) }, (_, o) => o * window.stride - window.low);
  const marks = [{ kind: "window", rows: step.rows, cols: step.cols }];
  if (cell >= 3) {
    marks.unshift({ kind: "strides", ys: starts(reader.rows, height), xs: starts(reader.cols, width), edge: { y: -pad.top, x: -pad.left } });
  }
  if (winner) marks.push({ kind: "winner", ...winner });
  const canvas = h("canvas", { class: "input-map", role: "img", "aria-label": `${source.name}, ${page.t.inputChannel(channel)}` });
  scene.picture(source.index).then(({ values }) => {
    draw(canvas, page.bitmapOf(source, channel, values), { height, width, pad, marks, cell, palette: page.palette });
  }).catch((error) => page.failed(error));
  return h("button", {
    type: "button", class: "figure", "data-key": `map-${source.index}-${channel}`,
    title: page.t.goThere,
    onclick: () => goToWindow(page, step, source, channel),
  }, canvas);
}

/** Looks at the first place of a step's window on the map it reads. */
function goToWindow(page, step, source, channel) {
  const inside = (axis, n) => Math.min(Math.max(axis[0].i, 0), n - 1);
  const [, height, width] = source.size;
  page.go({ box: source.index, channel, y: inside(step.rows, height), x: inside(step.cols, width), held: true });
}

// -------------------------------------------------------------------------------------- pool

function pooling(page, step) {
  const { t, scene } = page;
  const source = scene.boxes[scene.boxes[step.box].inputs[0]];
  const place = step.winner === null ? null : step.cells[step.winner];
  const axes = { rows: step.rows.map((row) => row.i), cols: step.cols.map((col) => col.i) };
  const padded = step.cells.some((cell) => !cell.on);
  const wide = Math.max(step.rows.length, step.cols.length) > WIDEST;
  return h("div", { class: "step" }, heading(page, step, step.divisor === null ? t.largest : t.mean(step.divisor)),
    h("div", { class: "products" },
      inputMap(page, step, source, step.channel, place),
      wide ? null : table(page, t.patch, step.cells, "value", axes, true, step.winner)),
    padded ? h("p", { class: "note" }, h("span", { class: "cell padding" }), ` ${step.divisor === null ? t.paddingNever : t.paddingAdds}`) : null);
}

// ------------------------------------------------------------------------------------ ledger

/** The sum line by line, from the input channels to the value. */
function ledger(page, steps) {
  const { t, scene } = page;
  const rows = [];
  const add = (sign, words, value, name, strong = false) => rows.push({ sign, words, value, name, strong });
  for (const step of steps) {
    const box = scene.boxes[step.box];
    if (step.kind === "conv" || step.kind === "linear") {
      const few = heaviest(step.channels);
      few.forEach((channel, i) => add(i ? "+" : "", step.kind === "conv" ? t.inputChannel(channel.index) : t.inputNumber(channel.index), channel.sum, "channel"));
      const rest = step.channels.length - few.length;
      if (rest) add("+", t.hidden(rest), step.total - few.reduce((sum, channel) => sum + channel.sum, 0), "rest");
      if (step.bias !== null) add("+", t.bias, step.bias, "bias");
      add("=", t.total, step.value, "sum", true);
    } else if (step.kind === "pool") {
      add("=", step.divisor === null ? t.largestOf : `${t.meanOf}: ${t.mean(step.divisor)}`, step.value, "pool", true);
    } else if (step.kind === "add" || step.kind === "mul") {
      if (steps[0] === step) add("", label(scene.boxes[step.from.index], t), step.main, "main");
      add(step.kind === "add" ? "+" : "×", label(scene.boxes[step.partner.index], t), step.other, "other");
      add("=", title(box, t), step.value, step.kind, true);
    } else if (step.kind === "norm") {
      if (steps[0] === step) add("", label(scene.boxes[step.from.index], t), step.main, "main");
      add("×", `${title(box, t)}: ${t.scaleBy}`, box.scale[step.channel], "scale");
      add("+", `${title(box, t)}: ${t.shiftBy}`, box.shift[step.channel], "shift");
      add("=", title(box, t), step.value, "norm", true);
    } else if (step.kind === "act") {
      if (steps[0] === step) add("", label(scene.boxes[step.from.index], t), step.main, "main");
      add("=", `${box.act}: ${box.formula}`, step.value, "act", true);
    } else {
      add("=", title(box, t), step.value, step.kind, true);
    }
  }
  const write = writer(rows.map((row) => row.value));
  return h("table", { class: "ledger" }, h("tbody", {}, rows.map((row) => h("tr", { class: row.strong ? "result" : null, "data-row": row.name },
    h("td", { class: "sign" }, row.sign), h("th", { scope: "row" }, row.words), h("td", { class: "number", "data-value": row.value }, write(row.value))))));
}

function check(page, step) {
  const { t, scene } = page;
  const own = scene.boxes[step.box].own ? t.networks : t.steps;
  const digits = (v) => (Number.isFinite(v) ? String(Number(v.toPrecision(7))) : String(v));
  const difference = step.value === step.stored ? 0 : Math.abs(step.value - step.stored);
  return h("p", { class: step.matches ? "check good" : "check bad", "data-matches": String(step.matches), "data-explained": step.value, "data-network": step.stored },
    h("b", {}, `${step.matches ? "✓" : "✗"} ${t.check}: `),
    `${t.explained} ${digits(step.value)}, ${own} ${digits(step.stored)}, ${t.difference} ${difference.toExponential(1)}: `,
    h("b", {}, step.matches ? t.ok : t.wrong));
}

export function show(element, page, steps) {
  fill(element, h("h2", {}, page.t.sum), arithmetic(page, steps));
}
