// Numbers as colours: blue for positive, orange for negative, which the colour-blind tell apart
// (the pair of ColorBrewer's PuOr and RdBu that no common deficiency confuses), neutral at zero.

const SCALES = {
  light: { zero: [247, 247, 244], half: [[240, 163, 92], [112, 164, 214]], full: [[150, 62, 4], [10, 56, 116]] },
  dark: { zero: [30, 33, 40], half: [[160, 90, 36], [44, 104, 164]], full: [[255, 190, 122], [142, 202, 255]] },
};

/** The colour [r, g, b] of a share between -1 and 1. NaN is magenta in both themes. */
export function colour(share, theme) {
  if (Number.isNaN(share)) return [214, 0, 147];
  const { zero, half, full } = SCALES[theme];
  const side = share < 0 ? 0 : 1;
  const size = Math.min(Math.abs(share), 1);
  const [from, to, part] = size < 0.5 ? [zero, half[side], size * 2] : [half[side], full[side], size * 2 - 1];
  return from.map((v, i) => Math.round(v + (to[i] - v) * part));
}

/** The scale from -1 to 1 as the stops of a CSS gradient. */
export function stops(theme) {
  return [-1, -0.5, 0, 0.5, 1].map((share) => `rgb(${colour(share, theme)})`).join(", ");
}

/** Whether black or white writing stands out on a colour. */
export function ink([r, g, b]) {
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111" : "#fff";
}

/** Numbers written alike: as many decimals as the largest of them needs. */
export function writer(values) {
  let largest = 0, whole = true;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    largest = Math.max(largest, Math.abs(value));
    if (value % 1) whole = false;
  }
  const sign = (text) => text.replace(/^-(?=[0.]*$)/, "").replace("-", "−");
  const odd = (v) => (Number.isNaN(v) ? "NaN" : v > 0 ? "∞" : "−∞");
  const plain = (write) => (v) => (Number.isFinite(v) ? sign(write(v)) : odd(v));
  if (largest >= 1e6 || (largest > 0 && largest < 1e-4)) return plain((v) => v.toExponential(2));
  if (whole) return plain((v) => v.toFixed(0));
  const magnitude = Math.floor(Math.log10(largest));
  const decimals = 3 - Math.max(magnitude, 0) - Math.min(magnitude + 1, 0);
  return plain((v) => v.toFixed(Math.max(decimals, 0)));
}
