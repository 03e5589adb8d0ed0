// Formats numbers, times and names for display.

export const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`);

/** A number with about three significant digits. */
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  if (size >= 100 || Number.isInteger(value)) return value.toFixed(0);
  if (size >= 1) return value.toFixed(2);
  if (size >= 0.001 || size === 0) return value.toFixed(3);
  return value.toExponential(1);
}

/** Two decimals, with a real minus sign. */
export const fixed = (value) => `${value < 0 ? "−" : ""}${Math.abs(value).toFixed(2)}`;

/** With its sign, for advantages. */
export const signed = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}`;

/** A time span as "… ago". */
export const ago = (value) => `${value < 90 ? `${Math.max(0, Math.round(value))} s` : seconds(value)} ago`;

export const seconds = (value) => (value >= 90 ? `${(value / 60).toFixed(1)} min` : `${value.toFixed(1)} s`);

export const bytes = (value) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}`;
};

export const clock = (unix) => (unix ? new Date(unix * 1000).toLocaleString() : "–");

export const words = (name) => (name || "unknown").replaceAll("_", " ");

export const versions = (item) =>
  item.oldest_version === item.newest_version ? `v${item.newest_version}` : `v${item.oldest_version}–${item.newest_version}`;

export const clip = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

/** How long an episode or a group is: steps, and calls of the policy where a step took several or none was trained on. */
export const length = (item) => (item.turns === item.steps ? `${item.steps} steps` : `${item.turns} steps, ${item.steps} calls`);
