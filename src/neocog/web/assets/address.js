// The address remembers what is looked at: #box=3&channel=5&at=3,2&hold=1&lang=ko&theme=dark

export function read() {
  const found = new URLSearchParams(location.hash.slice(1));
  const whole = (name) => (/^\d+$/.test(found.get(name) ?? "") ? Number(found.get(name)) : undefined);
  const at = /^(\d+),(\d+)$/.exec(found.get("at") ?? "");
  return {
    box: whole("box"), channel: whole("channel"),
    y: at ? Number(at[1]) : undefined, x: at ? Number(at[2]) : undefined,
    held: found.get("hold") === "1", lang: found.get("lang"), theme: found.get("theme"),
  };
}

let waiting = null;

/** Remembers a place, once it is not left again at once: browsers refuse many changes in a row. */
export function write(state) {
  clearTimeout(waiting);
  waiting = setTimeout(() => remember(state), 120);
}

function remember({ box, channel, y, x, held, lang, theme }) {
  const parts = [`box=${box}`, `channel=${channel}`, `at=${y},${x}`];
  if (held) parts.push("hold=1");
  parts.push(`lang=${lang}`);
  if (theme) parts.push(`theme=${theme}`);
  const hash = `#${parts.join("&")}`;
  if (location.hash === hash) return;
  try {
    history.replaceState(null, "", hash);
  } catch {
    // a frame without an address of its own, as in a notebook: nothing to remember it in
  }
}
