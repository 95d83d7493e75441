// The feature map: the steps of its block as tabs, the chosen channel large, all channels small.

import { stops, writer } from "neocog/colours";
import { h } from "neocog/elements";
import { bitmap, draw } from "neocog/plane";
import { details, label, title } from "neocog/texts";

const FIRST = 64; // channels shown before one asks for more
const LARGEST_CELL = 30;

/** How a box is laid out: a map as it is, a vector wrapped into rows. */
export function layout(box) {
  const [channels, height, width] = box.size;
  if (height * width > 1) return { vector: false, height, width };
  const side = Math.ceil(Math.sqrt(channels));
  return { vector: true, height: Math.ceil(channels / side), width: side };
}

/** The tabs and the large map; `page.canvas` is what is pointed at. */
export function featureMap(page) {
  const { scene, t, state } = page;
  const box = scene.boxes[state.box];
  const block = scene.blocks[box.block];
  const tabs = h("div", { class: "tabs", role: "group", "aria-label": t.step }, block.boxes.map((index) => {
    const one = scene.boxes[index];
    return h("button", {
      type: "button", "data-key": `tab-${index}`, "aria-pressed": String(index === state.box),
      disabled: !scene.shows(index), title: scene.shows(index) ? null : t.missing,
      onclick: () => page.go({ box: index }),
    }, [title(one, t), ...details(one, t)].join(", "));
  }));
  const dead = box.dead.includes(state.channel);
  page.canvas = h("canvas", {
    class: "large", tabindex: "0", role: "application", "data-key": "map",
    "aria-label": `${box.name}, ${t.result}`, "aria-describedby": "map-hint",
  });
  return [
    h("h2", {}, label(box, t), h("small", {}, ` ${t.channel(state.channel, box.size[0])}`)), tabs,
    h("p", { class: "badge", hidden: !dead }, t.deadOne),
    h("div", { class: "large-room" }, page.canvas),
    h("div", { class: "legend", "aria-hidden": "true" }, h("span", { class: "least" }), h("span", { class: "scale-bar", style: `background:linear-gradient(90deg, ${stops(page.theme)})` }), h("span", { class: "most" })),
    h("p", { class: "readout", "aria-live": "polite" }),
    h("p", { class: "hint", id: "map-hint" }, t.hint),
  ];
}

/** Another channel of the same box: what the panels above and below the map say of it. */
export function nameChannel(page) {
  const { scene, t, state, parts } = page;
  const box = scene.boxes[state.box];
  parts.map.querySelector("h2 small").textContent = ` ${t.channel(state.channel, box.size[0])}`;
  parts.map.querySelector(".badge").hidden = !box.dead.includes(state.channel);
  for (const button of parts.gallery.querySelectorAll(".mini")) {
    const chosen = Number(button.dataset.channel) === state.channel;
    button.setAttribute("aria-pressed", String(chosen));
  }
}

/** Draws the large map with the chosen pixel; while it plays, only what is computed so far. */
export async function drawLarge(page) {
  const { scene, state, canvas } = page;
  const box = scene.boxes[state.box];
  const { vector, height, width } = layout(box);
  const found = await scene.map(state.box);
  if (!found || page.canvas !== canvas) return;
  const size = vector ? box.size[0] : height * width;
  const plane = vector ? found.values : found.values.subarray(state.channel * size, (state.channel + 1) * size);
  const at = vector ? state.channel : state.y * width + state.x;
  const room = canvas.parentElement.clientWidth - 4;
  const fitting = Math.min(room / width, 420 / height);
  const cell = fitting >= 1 ? Math.min(Math.floor(fitting), LARGEST_CELL) : fitting;
  const picture = bitmap(plane, height, width, page.share(box, state.channel), page.theme, state.filled ?? size);
  const marks = [{ kind: "cell", y: Math.floor(at / width), x: at % width, thick: cell < 4 ? 1.5 : 2.5 }];
  draw(canvas, picture, { height, width, marks, cell, palette: page.palette });
  canvas.dataset.cell = cell;
  const value = plane[at];
  const name = vector && scene.classes && state.box === scene.answer ? ` (${scene.classes[at]})` : "";
  const about = found.exact ? "" : "≈ "; // a picture has 8 bits a value
  const text = page.t.moved(state.channel + name, state.y, state.x, about + writer([value])(value));
  const most = state.scale === "own" && !vector ? box.largest[state.channel] : box.most;
  const ends = writer([most]);
  const part = (name) => canvas.parentElement.parentElement.querySelector(name);
  part(".least").textContent = ends(-most);
  part(".most").textContent = ends(most);
  const readout = canvas.parentElement.parentElement.querySelector(".readout");
  readout.textContent = state.held ? `${text} · ${page.t.held}` : text;
}

/** Which place an event on the large map is at. */
export function placeAt(page, event) {
  const box = page.scene.boxes[page.state.box];
  const { vector, height, width } = layout(box);
  const area = page.canvas.getBoundingClientRect();
  const cell = Number(page.canvas.dataset.cell) || 1;
  const whole = (v, n) => Math.min(Math.max(Math.floor(v / cell), 0), n - 1);
  const [y, x] = [whole(event.clientY - area.top, height), whole(event.clientX - area.left, width)];
  return vector ? { channel: Math.min(y * width + x, box.size[0] - 1), y: 0, x: 0 } : { y, x };
}

/** All channels of the box, as buttons. */
export function gallery(page) {
  const { scene, t, state } = page;
  const box = scene.boxes[state.box];
  if (layout(box).vector) return [];
  const [channels] = box.size;
  const count = page.allChannels ? channels : Math.min(channels, Math.max(FIRST, state.channel + 1));
  const buttons = Array.from({ length: count }, (_, c) => {
    const dead = box.dead.includes(c);
    const canvas = h("canvas", { width: 44, height: 44, "aria-hidden": "true" });
    return h("button", {
      type: "button", class: dead ? "mini dead" : "mini", "data-key": `channel-${c}`, "data-channel": c,
      "aria-pressed": c === state.channel ? "true" : "false",
      "aria-label": dead ? `${t.channel(c, channels)}, ${t.deadOne}` : t.channel(c, channels), title: dead ? t.deadOne : null,
      onclick: () => page.go({ channel: c }),
    }, canvas, h("span", {}, c));
  });
  paint(page, box, buttons).catch((error) => page.failed(error));
  const scale = h("fieldset", { class: "scale" }, h("legend", {}, t.scale), ["own", "shared"].map((name) =>
    h("label", {}, h("input", { type: "radio", name: "scale", value: name, checked: state.scale === name, "data-key": `scale-${name}`, onchange: () => page.go({ scale: name }) }), ` ${t[name]}`)));
  return [
    h("div", { class: "gallery-head" }, h("h3", {}, t.channels), scale),
    h("div", { class: "gallery", role: "group", "aria-label": t.channels }, buttons),
    count < channels ? h("button", { type: "button", class: "more", "data-key": "channels", onclick: () => { page.allChannels = true; page.refresh(); } }, t.showAll(channels)) : null,
  ];
}

async function paint(page, box, buttons) {
  const [, height, width] = box.size;
  const found = await page.scene.picture(box.index);
  if (!found) return;
  buttons.forEach((button, c) => {
    const context = button.querySelector("canvas").getContext("2d");
    context.imageSmoothingEnabled = Math.max(height, width) > 44;
    context.drawImage(page.bitmapOf(box, c, found.values), 0, 0, 44, 44);
  });
}
