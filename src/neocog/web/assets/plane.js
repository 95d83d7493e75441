// Drawing one channel: its values, its padding, and what is pointed at.

import { colour } from "neocog/colours";

/** Paints height x width values at one pixel each; `share` turns a value into -1..1. */
export function bitmap(values, height, width, share, theme, upTo = Infinity) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < height * width && i < upTo; i++) {
    const [r, g, b] = colour(share(values[i]), theme);
    image.data.set([r, g, b, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The picture as it looks: grey, or the three channels as colours, from darkest to brightest. */
export function photograph(values, [channels, height, width]) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const size = height * width;
  const grey = (v) => Math.round((255 * (v - low)) / (high - low || 1));
  for (let i = 0; i < size; i++) {
    const parts = channels === 3 ? [0, 1, 2] : [0, 0, 0];
    image.data.set([...parts.map((c) => grey(values[c * size + i])), 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** A canvas of a map and the padding around it, with marks.
 *
 * picture: a bitmap; [height, width] of it; pad: {top, bottom, left, right} cells around it.
 * marks: list of {kind, ...}, see MARKS. cell: the edge of a cell in CSS pixels.
 */
export function draw(canvas, picture, { height, width, pad = {}, marks = [], cell, palette }) {
  const { top = 0, bottom = 0, left = 0, right = 0 } = pad;
  const dense = window.devicePixelRatio || 1;
  const [across, down] = [(left + width + right) * cell, (top + height + bottom) * cell];
  [canvas.width, canvas.height] = [Math.round(across * dense), Math.round(down * dense)];
  [canvas.style.width, canvas.style.height] = [`${across}px`, `${down}px`];
  const context = canvas.getContext("2d");
  context.setTransform(dense, 0, 0, dense, 0, 0);
  context.imageSmoothingEnabled = false;
  if (top + bottom + left + right) hatch(context, 0, 0, across, down, palette);
  context.clearRect(left * cell, top * cell, width * cell, height * cell);
  hatch(context, left * cell, top * cell, width * cell, height * cell, palette, true);
  context.drawImage(picture, left * cell, top * cell, width * cell, height * cell);
  const place = (y, x) => [(left + x) * cell, (top + y) * cell];
  for (const mark of marks) MARKS[mark.kind](context, place, cell, mark, palette);
}

/** Slanted lines: padding, or (faint) what is not computed yet. */
function hatch(context, x, y, width, height, palette, faint = false) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = palette.under;
  context.fillRect(x, y, width, height);
  context.strokeStyle = faint ? palette.faint : palette.hatch;
  context.lineWidth = 1;
  context.beginPath();
  for (let d = -height; d < width; d += 6) {
    context.moveTo(x + d, y + height);
    context.lineTo(x + d + height, y);
  }
  context.stroke();
  context.restore();
}

function outlined(context, palette, width, path) {
  // a light and a dark line, so that one of them shows on any colour
  for (const [colour, extra] of [[palette.halo, 2], [palette.mark, 0]]) {
    context.strokeStyle = colour;
    context.lineWidth = width + extra;
    path();
    context.stroke();
  }
}

const MARKS = {
  /** One cell. */
  cell(context, place, cell, { y, x, thick = 2 }, palette) {
    const [left, top] = place(y, x);
    outlined(context, palette, thick, () => {
      context.beginPath();
      context.rect(left, top, cell, cell);
    });
  },
  /** The cells of a window; the span is dashed where dilation leaves gaps in it. */
  window(context, place, cell, { rows, cols }, palette) {
    const gaps = [rows, cols].some((axis) => axis.length > 1 && axis[1].i - axis[0].i > 1);
    const [left, top] = place(rows[0].i, cols[0].i);
    const [right, bottom] = place(rows.at(-1).i + 1, cols.at(-1).i + 1);
    context.save();
    if (gaps) context.setLineDash([3, 3]);
    outlined(context, palette, 2, () => {
      context.beginPath();
      context.rect(left, top, right - left, bottom - top);
    });
    context.restore();
    if (!gaps) return;
    for (const row of rows) {
      for (const col of cols) MARKS.cell(context, place, cell, { y: row.i, x: col.i, thick: 1.5 }, palette);
    }
  },
  /** Where the windows of all outputs begin, as ticks along the upper and the left edge. */
  strides(context, place, cell, { ys, xs, edge }, palette) {
    context.fillStyle = palette.mark;
    const size = Math.min(4, cell / 2);
    for (const x of xs) context.fillRect(place(0, x)[0] + cell / 2 - size / 4, place(edge.y, 0)[1], size / 2, size);
    for (const y of ys) context.fillRect(place(0, edge.x)[0], place(y, 0)[1] + cell / 2 - size / 4, size, size / 2);
  },
  /** The largest of a pool's window. */
  winner(context, place, cell, { y, x }, palette) {
    const [left, top] = place(y, x);
    outlined(context, palette, 2.5, () => {
      context.beginPath();
      context.arc(left + cell / 2, top + cell / 2, Math.max(cell / 2 - 1, 3), 0, 7);
    });
  },
  /** A rectangle of cells [y0, y1) x [x0, x1). */
  area(context, place, cell, { ys, xs }, palette) {
    const [left, top] = place(ys[0], xs[0]);
    const [right, bottom] = place(ys[1], xs[1]);
    context.fillStyle = palette.veil;
    context.fillRect(left, top, right - left, bottom - top);
    outlined(context, palette, 2, () => {
      context.beginPath();
      context.rect(left, top, right - left, bottom - top);
    });
  },
};
