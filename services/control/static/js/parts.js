// Small pieces that several pages show.

import { h, s } from "./dom.js";
import { signed } from "./format.js";

/** The name of an advantage: A, or with the level E or S below it. */
export const level = (below) => h("span", { class: "level" }, "A", below && h("sub", null, below));

/** Won or lost, in colour and in words. */
export const outcome = (won) => h("span", { class: won ? "badge good" : "badge bad" }, won ? "won" : "lost");

/** An advantage as a word with its sign and colour. */
export const advantage = (value) => h("span", { class: value > 0.005 ? "plus" : value < -0.005 ? "minus" : "muted" }, signed(value));

/** A bar to the left (worse than the group, orange) or right (better, blue) of the middle; `most` is a full half. */
export function bar(value, most) {
  const share = most > 0 ? Math.min(1, Math.abs(value) / most) * 50 : 0;
  const x = value < 0 ? 50 - share : 50;
  return s(
    "svg",
    { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("rect", { class: value < 0 ? "bar-minus" : "bar-plus", x, y: 1, width: share, height: 8 }),
    s("line", { class: "bar-zero", x1: 50, x2: 50, y1: 0, y2: 10 }),
  );
}

/** A label, a bar and the number. */
export const advantageLine = (below, title, value, most) =>
  h("div", { class: "adv-line" }, h("abbr", { title }, level(below)), bar(value, most), h("span", { class: "num" }, advantage(value)));

/** What a list offers: [[value, text]]; the empty value means all. */
export const choices = (options, value) => options.map(([key, text]) => h("option", { value: key, selected: key === (value ?? "") }, text));

/** Selection among `choices`. */
export function select(label, options, value, onchange) {
  return h("label", { class: "field" }, label, h("select", { onchange: (event) => onchange(event.target.value) }, choices(options, value)));
}

/** What stands where a run has kept no groups. */
export const nothingKept = () =>
  h(
    "p",
    { class: "notice" },
    "This run has kept no groups. Training writes them into the run's folder while ",
    h("code", null, "telemetry.keep_groups_mib"),
    " is not 0; runs of earlier versions have none.",
  );
