// One value taken apart: the steps inside its block, from the inputs of the block to the value.

import { taps } from "neocog/window";

/** The steps that lead to a value, in the order in which they are computed.
 *
 * Each is {box, kind, channel, y, x, stored, value, ...}: `stored` is the network's number, `value`
 * the one computed here from what the block was given. The last one is the value asked for; it has
 * `allowed`, how far the two may be apart, and `matches`. A step of kind "missing" says that the
 * page does not hold the numbers.
 */
export async function trace(scene, index, channel, y, x) {
  const steps = [];
  const block = scene.boxes[index].block;
  let at = { index, channel, y, x };
  while (at) {
    const step = await stepAt(scene, at, block);
    steps.unshift(step);
    at = step.from && scene.boxes[step.from.index].block === block ? step.from : null;
  }
  if (steps.some((step) => step.kind === "missing")) return [{ ...steps.at(-1), kind: "missing" }];
  steps.forEach((step, number) => {
    const box = scene.boxes[step.box];
    step.value = combined(box, step, steps[number - 1]?.value);
    step.terms = terms(box, step, steps[number - 1]?.terms);
  });
  const last = steps.at(-1);
  last.allowed = await allowed(scene, last);
  last.matches = same(last.value, last.stored) || Math.abs(last.value - last.stored) <= last.allowed
    // float32 ends where these numbers do not, and beyond it PyTorch's own functions differ
    || (!Number.isFinite(last.stored) && steps.some((step) => !Number.isFinite(Math.fround(step.value)) || !Number.isFinite(step.stored)));
  return steps;
}

function same(a, b) {
  return a === b || (Number.isNaN(a) && Number.isNaN(b));
}

/** As neocog.tracing: a share of the map's largest value, or of the terms where they cancel. */
async function allowed(scene, last) {
  const { values } = await scene.map(last.box);
  const [, height, width] = scene.boxes[last.box].size;
  const plane = values.subarray(last.channel * height * width, (last.channel + 1) * height * width);
  let largest = 0;
  for (const value of plane) if (Number.isFinite(value)) largest = Math.max(largest, Math.abs(value));
  const terms = Number.isFinite(last.terms) ? last.terms : 0;
  return Math.max(1e-5 * largest, 2 ** -22 * terms);
}

function valueAt(map, size, channel, y, x) {
  return map.values[(channel * size[1] + y) * size[2] + x];
}

async function stepAt(scene, at, block) {
  const box = scene.boxes[at.index];
  const map = await scene.map(at.index);
  const step = { box: at.index, kind: box.kind, channel: at.channel, y: at.y, x: at.x };
  if (!map) return { ...step, kind: "missing" };
  step.stored = valueAt(map, box.size, at.channel, at.y, at.x);
  if (box.kind === "image" || box.kind === "plain") return step;
  if (!map.exact) return { ...step, kind: "missing" };
  const inputs = await Promise.all(box.inputs.map((i) => scene.map(i)));
  if (inputs.some((input) => !input || !input.exact)) return { ...step, kind: "missing" };
  return READERS[box.kind](scene, box, step, inputs, block);
}

/** What a step reads: one function a kind of box. */
const READERS = {
  conv: windowed,
  linear: windowed,
  pool: pooled,
  act: (scene, box, step, inputs) => passing(scene, box, step, inputs, step),
  norm: (scene, box, step, inputs) => passing(scene, box, step, inputs, step),
  add: paired,
  mul: paired,
  cat(scene, box, step, inputs) {
    let channel = step.channel;
    const input = box.inputs.findIndex((index) => {
      const count = scene.boxes[index].size[0];
      if (channel < count) return true;
      channel -= count;
      return false;
    });
    return passing(scene, box, step, inputs, { channel, y: step.y, x: step.x }, input);
  },
  flatten(scene, box, step, inputs) {
    const [, height, width] = scene.boxes[box.inputs[0]].size;
    const [channel, rest] = divided(step.channel, height * width);
    const [y, x] = divided(rest, width);
    return passing(scene, box, step, inputs, { channel, y, x });
  },
  pad(scene, box, step, inputs) {
    const [, height, width] = scene.boxes[box.inputs[0]].size;
    const [y, x] = [step.y - box.top, step.x - box.left];
    const on = y >= 0 && y < height && x >= 0 && x < width;
    if (!on) return { ...step, main: 0 };
    return passing(scene, box, step, inputs, { channel: step.channel, y, x });
  },
};

const divided = (a, b) => [Math.floor(a / b), a % b];

/** A step that takes one value from one place of one of its inputs. */
function passing(scene, box, step, inputs, { channel, y, x }, input = 0) {
  const index = box.inputs[input];
  const main = valueAt(inputs[input], scene.boxes[index].size, channel, y, x);
  return { ...step, from: { index, channel, y, x }, main };
}

/** A convolution, or a fully connected layer: the same with a window of one pixel. */
async function windowed(scene, box, step, [input]) {
  const source = scene.boxes[box.inputs[0]];
  const kernel = await scene.kernel(box.index, step.channel);
  if (!kernel) return { ...step, kind: "missing" };
  const [perGroup, kh, kw] = box.kernel.shape.slice(1);
  const first = Math.floor(step.channel / (box.kernel.shape[0] / (box.groups ?? 1))) * perGroup;
  const one = [{ k: 0, i: 0, on: true, padded: true }];
  const rows = box.rows ? taps(box.rows, step.y, source.size[1]) : one;
  const cols = box.cols ? taps(box.cols, step.x, source.size[2]) : one;
  let total = 0, magnitude = 0;
  const channels = [];
  for (let c = 0; c < perGroup; c++) {
    const cells = [];
    let sum = 0;
    for (const row of rows) {
      for (const col of cols) {
        const on = row.on && col.on;
        const given = on ? valueAt(input, source.size, first + c, row.i, col.i) : 0;
        const weight = kernel[(c * kh + row.k) * kw + col.k];
        const product = given * weight;
        sum += product;
        magnitude += Math.abs(product);
        cells.push({ on, input: given, weight, product });
      }
    }
    total += sum;
    channels.push({ index: first + c, cells, sum });
  }
  const bias = box.bias ? box.bias[step.channel] : null;
  magnitude += Math.abs(bias ?? 0);
  return { ...step, rows, cols, channels, total, bias, magnitude };
}

function pooled(scene, box, step, [input]) {
  const source = scene.boxes[box.inputs[0]];
  const rows = taps(box.rows, step.y, source.size[1]);
  const cols = taps(box.cols, step.x, source.size[2]);
  const cells = [];
  let winner = null, shown = null;
  for (const row of rows) {
    for (const col of cols) {
      const on = row.on && col.on;
      const value = on ? valueAt(input, source.size, step.channel, row.i, col.i) : 0;
      cells.push({ on, padded: row.padded && col.padded, value, y: row.i, x: col.i });
      if (!on) continue;
      const best = shown === null ? -Infinity : cells[shown].value;
      if (shown === null || value > best || Number.isNaN(value)) shown = cells.length - 1;
    }
  }
  if (box.mode === "max") winner = shown;
  const counted = cells.filter((cell) => (box.countPadding ? cell.padded : cell.on)).length;
  const divisor = box.mode === "max" ? null : box.divisor ?? counted;
  const place = shown === null ? null : cells[shown];
  const from = place && { index: source.index, channel: step.channel, y: place.y, x: place.x };
  const magnitude = cells.reduce((sum, cell) => sum + Math.abs(cell.value), 0) / (divisor ?? 1);
  return { ...step, rows, cols, cells, winner, shown, divisor, from, magnitude };
}

/** A sum or a product of two maps; the path goes on through the one in the same block. */
function paired(scene, box, step, inputs, block) {
  const inside = box.inputs.map((i) => scene.boxes[i].block === block);
  const main = inside.indexOf(true) === -1 ? 0 : inside.indexOf(true);
  const other = 1 - main;
  const at = (place) => {
    const { size } = scene.boxes[box.inputs[place]];
    const y = size[1] === 1 ? 0 : step.y;
    const x = size[2] === 1 ? 0 : step.x;
    const index = box.inputs[place];
    return { index, channel: step.channel, y, x };
  };
  const read = (place) => {
    const { index, channel, y, x } = at(place);
    return valueAt(inputs[place], scene.boxes[index].size, channel, y, x);
  };
  return { ...step, from: at(main), partner: at(other), main: read(main), other: read(other) };
}

/** The value of a step; `before` is that of the step it follows in its block, if there is one. */
function combined(box, step, before) {
  const given = before ?? step.main;
  switch (step.kind) {
    case "conv":
    case "linear":
      return step.total + (step.bias ?? 0);
    case "pool": {
      if (step.shown === null) return step.divisor === null ? -Infinity : 0;
      const values = step.cells.map((cell, i) => (i === step.shown && before !== undefined ? before : cell.value));
      if (step.divisor === null) return values[step.winner];
      return values.reduce((sum, value, i) => (step.cells[i].on ? sum + value : sum), 0) / step.divisor;
    }
    case "act":
      return ACTIVATIONS[box.act](given, box.slope);
    case "norm":
      return box.scale[step.channel] * given + box.shift[step.channel];
    case "add":
      return given + step.other;
    case "mul":
      return given * step.other;
    case "image":
    case "plain":
      return step.stored;
    default:
      return given;
  }
}

/** The sum of the absolute values of all that is added up: what rounding errors grow with. */
function terms(box, step, before) {
  const given = before ?? Math.abs(step.main ?? 0);
  switch (step.kind) {
    case "conv":
    case "linear":
      return step.magnitude;
    case "pool":
      return before ?? step.magnitude;
    case "norm":
      return given * Math.abs(box.scale[step.channel]) + Math.abs(box.shift[step.channel]);
    case "add":
      return given + Math.abs(step.other);
    case "mul":
      return given * Math.abs(step.other);
    default:
      return given;
  }
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const between = (low, x, high) => (Number.isNaN(x) ? x : Math.min(Math.max(x, low), high));

/** 1 - erf(x) for x >= 0: the series about 0, and far from it the continued fraction
 * (Abramowitz and Stegun 7.1.5 and 7.1.14), so that small results keep their digits. */
function erfc(x) {
  if (x < 2.5) {
    let term = x, sum = x;
    for (let n = 1; n < 60; n++) {
      term *= (-x * x) / n;
      sum += term / (2 * n + 1);
    }
    return 1 - (2 / Math.sqrt(Math.PI)) * sum;
  }
  let fraction = x;
  for (let n = 60; n > 0; n--) fraction = x + n / 2 / fraction;
  return Math.exp(-x * x) / Math.sqrt(Math.PI) / fraction;
}

/** The probability that a standard normal variable is below x. */
function normalBelow(x) {
  const half = erfc(Math.abs(x) / Math.SQRT2) / 2;
  return x < 0 ? half : 1 - half;
}

const ACTIVATIONS = {
  identity: (x) => x,
  relu: (x) => (Number.isNaN(x) ? x : Math.max(x, 0)),
  leaky_relu: (x, slope) => (x > 0 ? x : x * slope),
  relu6: (x) => between(0, x, 6),
  hardsigmoid: (x) => between(0, x + 3, 6) / 6,
  hardswish: (x) => (x * between(0, x + 3, 6)) / 6,
  sigmoid,
  tanh: Math.tanh,
  silu: (x) => x * sigmoid(x),
  gelu: (x) => x * normalBelow(x),
  gelu_tanh: (x) => x * sigmoid(2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)),
};
