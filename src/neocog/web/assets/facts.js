// What there is to say about a layer: sizes by formula, weights, work, plan and time.

import { h } from "neocog/elements";
import { shapeText } from "neocog/texts";

const number = (value) => value.toLocaleString("en");

export function facts(page) {
  const { scene, t, state } = page;
  const block = scene.blocks[scene.boxes[state.box].block];
  const rows = block.boxes.flatMap((index) => boxFacts(page, scene.boxes[index]));
  rows.push(...seen(page, scene.boxes[state.box]));
  if (block.plan) {
    rows.push([t.plan, h("code", {}, block.plan), h("details", {}, h("summary", {}, t.kernels), h("small", {}, block.kernels))]);
    const share = block.share ? `, ${t.share(`${Math.round(100 * block.share)} %`)}` : "";
    rows.push([t.time, `${block.microseconds.toFixed(1)} µs${share}`]);
  }
  return h("section", { class: "panel facts", "aria-label": t.facts },
    h("h2", {}, t.facts),
    h("dl", {}, rows.map(([name, ...values]) => h("div", { class: "fact" },
      h("dt", {}, name), h("dd", {}, values.map((value) => h("span", {}, value)))))),
    rows.some(([, value]) => value?.tagName === "CODE") ? h("p", { class: "note" }, t.formula) : null);
}

function boxFacts(page, box) {
  const { t } = page;
  if (box.kind === "plain") return [[box.name, box.what], ["", t.unknown]];
  const rows = [];
  if (box.formulas) {
    const name = t[box.kind](box);
    if (box.formulas.length === 1) rows.push([`${name}: ${t.size}`, h("code", {}, box.formulas[0])]);
    else rows.push([`${name}: ${t.height}`, h("code", {}, box.formulas[0])], [`${name}: ${t.width}`, h("code", {}, box.formulas[1])]);
    const { rows: ys, cols: xs } = box.unused;
    if (ys.length || xs.length) rows.push(["", h("span", { class: "badge" }, t.unused(ys, xs))]);
  }
  if (box.kind === "pool") rows.push([t.weights, t.noWeights]);
  if (box.weights !== undefined) {
    const [kernels, ...each] = box.kernel.shape;
    const words = box.kind === "conv" ? t.weightsOf(kernels, shapeText(each)) : `${each[0]}×${kernels}`;
    rows.push([t.weights, `${words} = ${number(box.weights)}`]);
    if (box.biases) rows.push([t.biases, number(box.biases)]);
    if (box.dense) rows.push([t.dense, number(box.dense)]);
    rows.push([t.work, number(box.multiplyAdds)]);
  }
  if (box.dead.length && box === page.scene.result(page.scene.blocks[box.block])) rows.push(["", h("span", { class: "badge" }, t.dead(box.dead.length))]);
  return rows;
}

function seen(page, box) {
  const { t } = page;
  const { sight } = box;
  if (typeof sight === "string") {
    const words = { all: t.seesAll, flat: t.seesFlat }[sight] ?? t.seesUnknown;
    return [[t.sees, words]];
  }
  const { rows, cols } = sight;
  const jump = rows.jump === cols.jump ? rows.jump : `${rows.jump}×${cols.jump}`;
  return [[t.sees, `${rows.size}×${cols.size}, ${t.jump(jump)}`]];
}
