// Window arithmetic along one axis, as in neocog/geometry.py.
// A window {size, stride, dilation, low, high, ceil} slides over an axis of n inputs.

export function span(window) {
  return window.dilation * (window.size - 1) + 1;
}

/** How many outputs the window gives; 0 or less if it does not fit. */
export function outSize(window, n) {
  const places = (n + window.low + window.high - span(window)) / window.stride;
  if (!window.ceil) return Math.floor(places) + 1;
  const out = Math.ceil(places) + 1;
  return (out - 1) * window.stride >= n + window.low ? out - 1 : out;
}

/** floor((28 - 1*(3-1) - 1 + 1 + 1)/1) + 1 = 28 */
export function formula(window, n) {
  const { size, stride, dilation, low, high, ceil } = window;
  const inside = `(${n} - ${dilation}*(${size}-1) - 1 + ${low} + ${high})/${stride}`;
  return `${ceil ? "ceil" : "floor"}(${inside}) + 1 = ${outSize(window, n)}`;
}

/** The taps of output o: [{k, i, on, padded}], i an input (on) or padding. */
export function taps(window, o, n) {
  return Array.from({ length: window.size }, (_, k) => {
    const i = o * window.stride - window.low + k * window.dilation;
    return { k, i, on: i >= 0 && i < n, padded: i >= -window.low && i < n + window.high };
  });
}

/** The inputs [first, stop) that output o of a receptive field {size, jump, start} may see. */
export function interval(field, o, n) {
  const first = field.start + o * field.jump;
  const inside = first >= 0 && first + field.size <= n;
  if (!inside && (field.period ?? null) !== null) return [0, n]; // around the edge, circular padding
  const cut = (i) => Math.min(Math.max(i, 0), n);
  return [cut(first), cut(first + field.size)];
}
