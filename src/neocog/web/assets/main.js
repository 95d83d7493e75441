// The page: what is looked at (state), and the panels that show it.

import * as address from "neocog/address";
import { fill, h } from "neocog/elements";
import { facts } from "neocog/facts";
import { field } from "neocog/field";
import { drawLarge, featureMap, gallery, layout, nameChannel, placeAt } from "neocog/map";
import { bitmap } from "neocog/plane";
import { Scene } from "neocog/scene";
import { blockTitle, strip } from "neocog/strip";
import { show } from "neocog/sum";
import { LANGUAGES } from "neocog/texts";
import { Player, playTools, tryTools } from "neocog/tools";
import { trace } from "neocog/trace";

const PALETTES = {
  light: { under: "#ecebe6", hatch: "#a9a79e", faint: "#d3d1c8", halo: "#ffffff", mark: "#111111", veil: "rgba(255, 204, 0, 0.28)" },
  dark: { under: "#23262d", hatch: "#666b76", faint: "#353a44", halo: "#000000", mark: "#ffffff", veil: "rgba(255, 204, 0, 0.25)" },
};

class Page {
  constructor(scene) {
    this.scene = scene;
    this.player = new Player(this);
    this.parts = {};
    this.bitmaps = new Map();
    for (const name of ["head", "strip", "map", "gallery", "tools", "sum", "facts", "field", "trial"]) {
      this.parts[name] = h("div", { class: `part part-${name}` });
    }
    const { head, strip: net, map, gallery: all, tools, sum, facts: about, field: seen, trial } = this.parts;
    sum.classList.add("panel");
    trial.classList.add("panel");
    document.querySelector("#app").replaceChildren(
      h("header", {}, head), net,
      h("main", {},
        h("section", { class: "panel look" }, map, tools, all), sum,
        h("div", { class: "side" }, seen, about, trial)));
    this.state = this.valid({ scale: "own", all: false, filled: null, ...address.read() });
    window.addEventListener("hashchange", () => this.go({ ...address.read(), filled: null }));
    window.addEventListener("resize", () => drawLarge(this));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") this.go({ held: false }); });
  }

  get t() { return LANGUAGES[this.state.lang]; }

  get theme() {
    return this.state.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  }

  get palette() { return PALETTES[this.theme]; }

  /** Turns the values of a channel into -1..1, by its own largest or by that of all channels. */
  share(box, channel) {
    const own = this.state.scale === "own" && !layout(box).vector;
    const largest = own ? box.largest[channel] : box.most;
    return (value) => value / (largest || 1);
  }

  /** A state that can be shown: positions that do not exist become the nearest that do. */
  valid(state) {
    const { boxes, blocks } = this.scene;
    const shown = (index) => this.scene.shows(index);
    const first = blocks.length > 1 ? this.scene.result(blocks[1]).index : 0;
    const box = boxes[shown(state.box) ? state.box : shown(first) ? first : 0];
    const inside = (v, n, otherwise) => (Number.isInteger(v) ? Math.min(Math.max(v, 0), Math.max(n - 1, 0)) : otherwise);
    const [channels, height, width] = box.size;
    const korean = (navigator.language ?? "").startsWith("ko");
    return {
      ...state, box: box.index, channel: inside(state.channel, channels, 0),
      y: inside(state.y, height, Math.floor(height / 2)), x: inside(state.x, width, Math.floor(width / 2)),
      lang: LANGUAGES[state.lang] ? state.lang : korean ? "ko" : "en",
      theme: PALETTES[state.theme] ? state.theme : null,
    };
  }

  /** Looks at something else, and draws what that changes. */
  go(changes) {
    const before = this.state;
    const given = Object.fromEntries(Object.entries(changes).filter(([, value]) => value !== undefined));
    const next = { ...before, ...given };
    if ("box" in given && given.box !== before.box) {
      this.player.stop();
      Object.assign(next, { filled: null, all: false }, this.follow(before.box, given), given);
      this.allChannels = false;
    }
    this.state = this.valid(next);
    const same = (...names) => names.every((name) => before[name] === this.state[name]);
    if (!same("lang", "theme")) this.draw();
    else if (!same("scale")) { fill(this.parts.strip, strip(this)); this.refresh(); }
    else if (!same("box")) this.refresh();
    else if (!same("channel")) this.rechannel();
    else this.point();
  }

  /** The same place in another box, by shares of height and width, unless a place is given. */
  follow(from, given) {
    if (given.y !== undefined) return {};
    const [, height, width] = this.scene.boxes[from].size;
    const target = this.scene.boxes[given.box];
    if (!this.scene.shows(given.box)) return {};
    return {
      y: Math.floor(((this.state.y + 0.5) / (height || 1)) * target.size[1]),
      x: Math.floor(((this.state.x + 0.5) / (width || 1)) * target.size[2]),
    };
  }

  /** Everything anew. */
  draw() {
    const { scene, t } = this;
    document.documentElement.lang = this.state.lang;
    document.documentElement.dataset.theme = this.theme;
    document.title = `${scene.image} ${t.in} ${scene.model} · neocog`;
    fill(this.parts.head, this.headline());
    fill(this.parts.strip, strip(this));
    this.refresh();
  }

  headline() {
    const { scene, t } = this;
    const count = (name) => scene.boxes.reduce((sum, box) => sum + (box[name] ?? 0), 0);
    const short = (n) => (n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : n >= 1e4 ? `${Math.round(n / 1e3)} k` : String(n));
    const ms = scene.milliseconds ? scene.milliseconds.toPrecision(3) : null;
    const other = this.state.lang === "en" ? "ko" : "en";
    return [
      h("div", {}, h("h1", {}, "neocog", h("span", {}, ` ${t.look}`)),
        h("p", { class: "about" }, h("b", {}, scene.image), ` ${t.in} `, h("b", {}, scene.model), ` · ${t.total_(short(count("weights")), short(count("multiplyAdds")), ms)}`),
        scene.notes.map((note) => h("p", { class: "hint" }, note))),
      h("div", { class: "switches" },
        h("button", { type: "button", class: "tool wide", "data-key": "lang", lang: other, onclick: () => this.go({ lang: other }) }, t.language),
        h("button", { type: "button", class: "tool wide", "data-key": "theme", title: t.theme, "aria-label": t.theme, onclick: () => this.go({ theme: this.theme === "dark" ? "light" : "dark" }) }, this.theme === "dark" ? "☀" : "☾")),
    ];
  }

  /** The panels of a box. */
  refresh() {
    const { scene, state } = this;
    const block = scene.blocks[scene.boxes[state.box].block];
    for (const card of this.parts.strip.querySelectorAll(".card")) {
      if (Number(card.dataset.block) === block.number) card.setAttribute("aria-current", "true");
      else card.removeAttribute("aria-current");
    }
    fill(this.parts.map, featureMap(this));
    this.listen();
    fill(this.parts.gallery, gallery(this));
    this.trial = null;
    fill(this.parts.facts, facts(this));
    this.parts.facts.querySelector("h2").append(h("small", {}, ` ${blockTitle(this, block)}`));
    this.showCard();
    this.refreshTools();
    this.point();
  }

  /** Another channel of the same box. */
  rechannel() {
    const shown = this.parts.gallery.querySelectorAll(".mini").length;
    if (shown && shown <= this.state.channel) fill(this.parts.gallery, gallery(this));
    nameChannel(this);
    fill(this.parts.trial, tryTools(this));
    this.point();
  }

  /** Moves the strip, and nothing else, so that the current card is seen. */
  showCard() {
    const net = this.parts.strip.querySelector("nav");
    const card = this.parts.strip.querySelector("[aria-current]")?.parentElement;
    if (!card) return;
    const [left, right] = [card.offsetLeft - 40, card.offsetLeft + card.offsetWidth + 40];
    if (left < net.scrollLeft) net.scrollLeft = left;
    else if (right > net.scrollLeft + net.clientWidth) net.scrollLeft = right - net.clientWidth;
  }

  /** A channel as a bitmap, kept for the next time: pointing draws many of them again and again. */
  bitmapOf(box, channel, values) {
    const [, height, width] = box.size;
    const key = [box.index, channel, this.state.scale, this.theme].join();
    if (!this.bitmaps.has(key)) {
      if (this.bitmaps.size > 2000) this.bitmaps.clear();
      const plane = values.subarray(channel * height * width, (channel + 1) * height * width);
      this.bitmaps.set(key, bitmap(plane, height, width, this.share(box, channel), this.theme));
    }
    return this.bitmaps.get(key);
  }

  /** Says what went wrong, such as a server that has stopped. */
  failed(error) {
    fill(this.parts.sum, h("h2", {}, this.t.sum), h("p", { class: "bad", role: "alert" }, this.scene.serve ? `${this.t.unreachable} (${error.message})` : error.message));
  }

  refreshTools() {
    fill(this.parts.tools, playTools(this));
    fill(this.parts.trial, tryTools(this));
    this.parts.trial.hidden = !this.parts.trial.childElementCount;
  }

  /** The pixel and what leads to it. */
  async point() {
    const { scene, state } = this;
    address.write(state);
    const turn = (this.turn = (this.turn ?? 0) + 1);
    this.parts.tools.querySelector('[data-key="whole"]')?.toggleAttribute("disabled", state.filled === null);
    try {
      await drawLarge(this);
      const [seen, steps] = [await field(this), await trace(scene, state.box, state.channel, state.y, state.x)];
      if (turn !== this.turn) return; // somewhere else by now
      fill(this.parts.field, seen);
      show(this.parts.sum, this, steps);
    } catch (error) {
      if (turn === this.turn) this.failed(error);
      return;
    }
    document.documentElement.dataset.shown = [state.box, state.channel, state.y, state.x].join(",");
  }

  listen() {
    const { canvas } = this;
    const to = (place, more = {}) => {
      const moved = Object.entries({ ...place, ...more }).some(([name, value]) => this.state[name] !== value);
      if (moved) this.go({ ...place, filled: null, ...more });
    };
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && !this.state.held) to(placeAt(this, event));
    });
    canvas.addEventListener("click", (event) => {
      this.player.stop();
      to(placeAt(this, event), { held: true });
    });
    canvas.addEventListener("keydown", (event) => {
      const [dy, dx] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
      const dc = { PageUp: -1, PageDown: 1 }[event.key] ?? 0;
      if (!dy && !dx && !dc) return;
      event.preventDefault();
      this.player.stop();
      const { y, x, channel } = this.state;
      const { vector, width } = layout(this.scene.boxes[this.state.box]);
      if (vector) to({ channel: channel + dy * width + dx + dc }, { held: true });
      else to({ y: y + dy, x: x + dx, channel: channel + dc }, { held: true });
    });
  }
}

/** Draws the page from the data in it. */
export function start() {
  const scene = new Scene(JSON.parse(document.querySelector("#scene").textContent));
  const page = new Page(scene);
  page.draw();
  window.neocog = { page, trace: (...at) => trace(scene, ...at) };
}
