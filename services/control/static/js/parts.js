// Small elements that several pages use.

import { h, s } from "./dom.js";
import { signed } from "./format.js";

/** The name of an advantage: A, with the level E or S as a subscript. */
export const level = (below) => h("span", { class: "level" }, "A", below && h("sub", null, below));

/** A badge "won" or "lost". */
export const outcome = (won) => h("span", { class: won ? "badge good" : "badge bad" }, won ? "won" : "lost");

/** An advantage with its sign and colour. */
export const advantage = (value) => h("span", { class: value > 0.005 ? "plus" : value < -0.005 ? "minus" : "muted" }, signed(value));

/** A bar left (worse than the group, orange) or right (better, blue) of the middle; `most` fills half the width. */
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

/** The options of a select, [[value, text]]; the empty value means all. */
export const choices = (options, value) => options.map(([key, text]) => h("option", { value: key, selected: key === (value ?? "") }, text));

/** A labelled select. */
export function select(label, options, value, onchange) {
  return h("label", { class: "field" }, label, h("select", { onchange: (event) => onchange(event.target.value) }, choices(options, value)));
}

/** The notice for a run without kept groups. */
export const nothingKept = () =>
  h(
    "p",
    { class: "notice" },
    "This run has no kept groups. Training writes them to the run's folder unless ",
    h("code", null, "telemetry.keep_groups_mib"),
    " is 0; runs of earlier versions have none.",
  );
