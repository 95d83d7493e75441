// The scene: what Python wrote into the page, decoded when it is asked for.

export class Scene {
  /** data: see neocog/web/payload.py */
  constructor(data) {
    Object.assign(this, data);
    this.pictures = new Map();
    this.maps = new Map();
    this.kernels = new Map();
    this.boxes.forEach((box, index) => {
      box.index = index;
      // JSON has no NaN and no infinities: they come as words
      const number = (value) => ({ nan: NaN, inf: Infinity, "-inf": -Infinity })[value] ?? value;
      for (const name of ["bias", "scale", "shift"]) if (box[name]) box[name] = box[name].map(number);
      box.size = sizeOf(box.shape);
      box.most = (box.largest ?? []).reduce((a, b) => Math.max(a, b), 0);
    });
    this.blocks.forEach((block, number) => {
      block.number = number;
      for (const index of block.boxes) this.boxes[index].block = number;
    });
  }

  /** The last box of a block: what the block gives. */
  result(block) {
    return this.boxes[block.boxes.at(-1)];
  }

  /** Whether a box can be drawn: its values are in the page, or its server has them. */
  shows(index) {
    const box = this.boxes[index];
    return Boolean(box?.map || (this.serve && box?.isMap));
  }

  /** What is good enough to draw: {values, exact}, or null where there is nothing. */
  picture(index) {
    return kept(this.pictures, index, async () => {
      const box = this.boxes[index];
      if (!box.map) return this.shows(index) ? this.map(index) : null;
      const bytes = await inflated(box.map.data);
      if (box.map.type === "float32") return { values: new Float32Array(bytes), exact: true };
      const steps = new Int8Array(bytes);
      const plane = box.size[1] * box.size[2];
      const values = Float32Array.from(steps, (step, i) =>
        (step / 127) * box.largest[Math.floor(i / plane)]);
      return { values, exact: false };
    });
  }

  /** The values of a box, exact if the page or its server has them. */
  map(index) {
    return kept(this.maps, index, async () => {
      const box = this.boxes[index];
      const fetches = this.serve && box.isMap && box.map?.type !== "float32";
      if (!fetches) return this.picture(index);
      return { values: await fetched(`map/${index}`), exact: true };
    });
  }

  /** The weights of one output channel, or null if the page does not have them. */
  async kernel(index, channel) {
    const kernel = this.boxes[index].kernel;
    const size = kernel.shape.slice(1).reduce((a, b) => a * b, 1);
    if (this.serve) {
      return kept(this.kernels, `${index}/${channel}`, () => fetched(`kernel/${index}/${channel}`));
    }
    if (!kernel.data) return null;
    const all = await kept(this.kernels, index, async () =>
      new Float32Array(await inflated(kernel.data)));
    return all.subarray(channel * size, (channel + 1) * size);
  }
}

/** [channels, height, width] of a shape without its batch; a vector is a map of one pixel. */
function sizeOf(shape) {
  if (shape.length === 3) return shape;
  return shape.length === 1 ? [shape[0], 1, 1] : [0, 0, 0];
}

/** A cache of promises, which forgets failures. */
function kept(cache, key, make) {
  if (!cache.has(key)) {
    cache.set(key, make().catch((error) => { cache.delete(key); throw error; }));
  }
  return cache.get(key);
}

async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function fetched(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return new Float32Array(await answer.arrayBuffer());
}
