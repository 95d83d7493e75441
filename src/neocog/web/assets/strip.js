// The network as a strip of cards, one a block, and the answer at its end.

import { h } from "neocog/elements";
import { bitmap, photograph } from "neocog/plane";
import { details, label, shapeText, title } from "neocog/texts";

const SHOWN = 9; // channels on a card
const EDGE = 78; // CSS pixels of a card's picture

export function strip(page) {
  const { scene, t } = page;
  const cards = scene.blocks.map((block) => h("li", {}, card(page, block)));
  if (scene.error) cards.push(h("li", {}, failure(page)));
  if (scene.probabilities) cards.push(h("li", {}, answer(page)));
  return h("nav", { class: "strip", "aria-label": t.network, "data-key": "strip-scroll" }, h("ol", {}, cards));
}

function card(page, block) {
  const { scene, t, state } = page;
  const result = scene.result(block);
  const boxes = block.boxes.map((index) => scene.boxes[index]);
  const head = boxes[0];
  const current = block.boxes.includes(state.box);
  const canvas = h("canvas", { class: "thumb", width: EDGE, height: EDGE, "aria-hidden": "true" });
  mosaic(page, result, canvas).catch((error) => page.failed(error));
  const reads = sources(page, block, boxes);
  const dead = result.dead.length ? t.deadShort(result.dead.length) : "";
  const names = boxes.map((box) => title(box, t)).join(" → ");
  return h("button", {
    class: "card", type: "button", disabled: !scene.shows(result.index), "data-key": `card-${block.number}`, "data-block": block.number,
    "aria-current": current ? "true" : null,
    "aria-label": [`${label(head, t)}: ${names}, ${shapeText(result.shape)}`, reads, dead, block.exact && !scene.serve ? t.exact : ""].filter(Boolean).join(", "),
    onclick: () => page.go({ box: result.index }),
  },
  h("span", { class: "card-name" }, block.exact && !scene.serve ? h("span", { class: "dot", title: t.exact }, "● ") : null, label(head, t)),
  canvas,
  h("span", { class: "card-what" }, boxes.map((box) => h("span", {}, title(box, t)))),
  h("span", { class: "card-shape" }, shapeText(result.shape)),
  reads ? h("span", { class: "card-from" }, reads) : null,
  dead ? h("span", { class: "badge" }, dead) : null);
}

/** Where a block reads from, if that is not just the block before it. */
function sources(page, block, boxes) {
  const { scene, t } = page;
  const outside = new Set(boxes.flatMap((box) => box.inputs).map((i) => scene.boxes[i].block));
  outside.delete(block.number);
  const before = outside.delete(block.number - 1);
  if (!outside.size) return "";
  const names = [...outside].map((number) => label(scene.boxes[scene.blocks[number].boxes[0]], t));
  return `${before ? t.plus : t.from} ${names.join(", ")}`;
}

/** Up to nine channels of a box side by side. */
async function mosaic(page, box, canvas) {
  const found = await page.scene.picture(box.index);
  const context = canvas.getContext("2d");
  if (!found) {
    context.fillStyle = page.palette.hatch;
    context.font = "32px system-ui";
    context.textAlign = "center";
    context.fillText("?", EDGE / 2, EDGE / 2 + 11);
    return;
  }
  const [channels, height, width] = box.size;
  context.imageSmoothingEnabled = Math.max(height, width) > EDGE;
  if (box.kind === "image") {
    const scale = EDGE / Math.max(height, width);
    context.drawImage(photograph(found.values, box.size), (EDGE - width * scale) / 2, (EDGE - height * scale) / 2, width * scale, height * scale);
    return;
  }
  if (height * width === 1) {
    column(page, found.values, box, context);
    return;
  }
  const side = Math.ceil(Math.sqrt(Math.min(channels, SHOWN)));
  const edge = EDGE / side;
  for (let c = 0; c < Math.min(channels, SHOWN); c++) {
    const picture = page.bitmapOf(box, c, found.values);
    context.drawImage(picture, (c % side) * edge, Math.floor(c / side) * edge, edge - 1, edge - 1);
  }
}

/** A vector: its values wrapped into a square. */
function column(page, values, box, context) {
  const side = Math.ceil(Math.sqrt(values.length));
  const padded = new Float32Array(side * side);
  padded.set(values);
  const largest = box.most || 1;
  const picture = bitmap(padded, side, side, (v) => v / largest, page.theme, values.length);
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, 0, 0, EDGE, EDGE);
}

function answer(page) {
  const { scene, t } = page;
  const names = scene.classes ?? scene.probabilities.map((_, i) => String(i));
  const order = scene.probabilities.map((p, i) => [p, i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  const best = order[0][1];
  const verdict = scene.truth === null ? null
    : scene.truth === best ? h("span", { class: "good" }, `✓ ${t.isRight}`)
      : h("span", { class: "bad" }, `✗ ${t.isWrong} ${names[scene.truth] ?? scene.truth}`);
  return h("section", { class: "answer", "aria-label": t.says },
    h("span", { class: "card-name" }, t.says),
    h("strong", { class: "class" }, names[best]), verdict,
    h("ol", { class: "bars" }, order.map(([p, i]) => h("li", {},
      h("button", { type: "button", class: "bar", "data-key": `class-${i}`, onclick: () => page.go({ box: scene.answer, channel: i, y: 0, x: 0, held: true }) },
        h("span", { class: "bar-name" }, names[i]),
        h("span", { class: "bar-room" }, h("span", { class: "bar-fill", style: `width:${(100 * p).toFixed(1)}%` })),
        h("span", { class: "bar-share" }, `${(100 * p).toFixed(1)} %`))))));
}

function failure(page) {
  const { scene, t } = page;
  return h("section", { class: "failure", role: "alert" },
    h("span", { class: "card-name" }, `✗ ${t.failed}`),
    h("p", {}, scene.error), h("p", { class: "note" }, t.formula));
}

/** What a block does, for headings: "conv1 — conv 3×3, padding 1 → relu → max pool 2×2". */
export function blockTitle(page, block) {
  const { scene, t } = page;
  return block.boxes.map((index) => scene.boxes[index])
    .map((box) => [title(box, t), ...details(box, t)].join(", ")).join(" → ");
}
