// The receptive field: which pixels of the picture a value may depend on.

import { h } from "neocog/elements";
import { draw, photograph } from "neocog/plane";
import { interval } from "neocog/window";

const EDGE = 240; // CSS pixels

/** Rows and columns [first, stop) of the picture, or null where that cannot be told. */
export function seen(scene, index, y, x) {
  const { sight } = scene.boxes[index];
  const [, height, width] = scene.boxes[0].size;
  if (sight === "all") return { ys: [0, height], xs: [0, width] };
  if (typeof sight === "string") return null;
  return { ys: interval(sight.rows, y, height), xs: interval(sight.cols, x, width) };
}

export async function field(page) {
  const { scene, t, state } = page;
  const box = scene.boxes[0];
  const found = await scene.picture(0);
  if (!found || box.size[1] * box.size[2] === 1) return [];
  const [, height, width] = box.size;
  const area = seen(scene, state.box, state.y, state.x);
  const canvas = h("canvas", { class: "field-map", role: "img", "aria-label": t.field });
  const empty = area && (area.ys[0] >= area.ys[1] || area.xs[0] >= area.xs[1]);
  const marks = area && !empty ? [{ kind: "area", ...area }] : [];
  page.photograph ??= photograph(found.values, box.size);
  draw(canvas, page.photograph, { height, width, marks, cell: EDGE / Math.max(height, width), palette: page.palette });
  const words = !area ? t.seesUnknown : empty ? t.none : t.fieldOf(area.ys[0], area.ys[1] - 1, area.xs[0], area.xs[1] - 1);
  return [h("section", { class: "panel", "data-field": area ? [...area.ys, ...area.xs].join(",") : "?" }, h("h2", {}, t.field), canvas, h("p", { class: "readout" }, words))];
}
