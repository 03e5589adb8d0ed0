// The graph of a group's anchor states, from left to right in the order in which they were first reached. Nodes are
// states, edges are actions: thicker if more steps took them, blue if better than the others in that state, else orange.

import { h, s } from "./dom.js";
import { loop, router } from "./edges.js";
import { clip, fixed as decimals, signed } from "./format.js";

const NARROWEST = 78;
const WIDEST = 124;
const ROW = 62;
const LEFT = 44;
const TOP = 66;
const SWEEPS = 6;
const AXIS = 40;
const END = 21;

const radius = (visits) => Math.min(21, 9 + 2.4 * Math.sqrt(visits));

/** Colour of an advantage: grey at 0, full blue or orange at ±`most`. */
export function colour(value, most) {
  const share = most > 0 ? Math.min(1, Math.abs(value) / most) : 0;
  return `color-mix(in oklab, var(${value < 0 ? "--minus" : "--plus"}) ${Math.round(100 * share ** 0.6)}%, var(--zero))`;
}

/** Positions of the states: one column for each first step, rows chosen to keep edges short. */
function layout(states, edges, room) {
  const columns = [...Map.groupBy(states, (state) => state.layer).entries()].sort((a, b) => a[0] - b[0]).map(([, list]) => list.map((one) => one.state));
  const row = new Map();
  const rank = (column) => column.forEach((state, i) => row.set(state, i - (column.length - 1) / 2));
  columns.forEach(rank);
  const near = new Map(states.map((one) => [one.state, []]));
  for (const edge of edges) {
    if (edge.target === null || edge.target === edge.source) continue;
    near.get(edge.target).push([edge.source, edge.count]);
    near.get(edge.source).push([edge.target, edge.count]);
  }
  const pull = (state) => {
    const list = near.get(state);
    const weight = list.reduce((sum, [, count]) => sum + count, 0);
    return weight ? list.reduce((sum, [other, count]) => sum + count * row.get(other), 0) / weight : row.get(state);
  };
  for (let sweep = 0; sweep < SWEEPS; sweep += 1) {
    for (const column of sweep % 2 ? columns.toReversed() : columns) {
      const wanted = new Map(column.map((state) => [state, pull(state)]));
      column.sort((a, b) => wanted.get(a) - wanted.get(b));
      rank(column);
    }
  }
  const column = Math.max(NARROWEST, Math.min(WIDEST, (room - LEFT - 90) / columns.length));
  const tallest = Math.max(...columns.map((column) => column.length));
  const place = new Map();
  columns.forEach((list, x) => {
    for (const state of list) place.set(state, [LEFT + x * column, TOP + (row.get(state) + (tallest - 1) / 2) * ROW]);
  });
  return { place, columns, column, width: LEFT + columns.length * column + 70, height: TOP + (tallest - 1) * ROW + 30 };
}

const width = (count) => 1 + 1.5 * Math.sqrt(count);

/**
 * Draw the graph. `chosen`: the selected state; `member`: an episode whose path is highlighted; `pick(state)`: called
 * when the user selects a state; `room`: available width in pixels; `value(edge)`: the advantage that colours an edge.
 */
export function draw(group, { chosen, member, pick, room, value }) {
  const { states, edges } = group;
  const { place, columns, column, width: wide, height } = layout(states, edges, room);
  const nodes = new Map(states.map((one) => [one.state, [...place.get(one.state), radius(one.steps.length)]]));
  const ends = endPlaces(edges, wide, height);
  const lay = router([...nodes.values(), ...Object.values(ends)], column);
  const most = Math.max(...edges.map((edge) => Math.abs(value(edge))), 1e-9);
  const lanes = new Map();
  const shapes = edges.map((edge) => {
    const key = `${edge.source} ${edge.target ?? edge.outcome}`;
    const lane = lanes.get(key) ?? 0;
    lanes.set(key, lane + 1);
    const from = nodes.get(edge.source);
    if (edge.target === edge.source) return loop(from, from[2], width(edge.count), lane);
    return lay(from, edge.target === null ? ends[edge.outcome] : nodes.get(edge.target), width(edge.count), lane);
  });
  const heights = shapes.flatMap((shape) => shape.points.map(([, y]) => y));
  const top = Math.min(TOP - 22, ...heights) - AXIS;
  const bottom = Math.max(height, ...heights) + 12;
  const svg = s(
    "svg",
    { width: wide, height: bottom - top, viewBox: `0 ${top} ${wide} ${bottom - top}`, role: "group", "aria-label": "Anchor states from left to right, in the order in which they were first reached" },
    axis(columns.map((list) => states.find((one) => one.state === list[0]).layer), column, top, bottom),
    edges.map((edge, i) => edgeView(edge, shapes[i], colour(value(edge), most), value(edge), faded(edge, chosen, member))),
    Object.entries(ends).map(([outcome, [x, y]]) => endView(outcome, x, y)),
    states.map((one) => nodeView(one, nodes.get(one.state), one.state === chosen, member !== null && !one.steps.some((step) => step.member === member), pick)),
  );
  return h("div", { class: "graph" }, svg);
}

/** Labels: above each column the step that first reached its states; between columns the steps that reached none. */
function axis(layers, column, top, bottom) {
  return layers.map((layer, i) => {
    const x = LEFT + i * column;
    const skipped = i + 1 < layers.length ? layers[i + 1] - layer - 1 : 0;
    const middle = x + column / 2;
    const which = skipped === 1 ? `${layer + 2}` : `${layer + 2}–${layer + 1 + skipped}`;
    return [
      s("text", { class: "column", x, y: top + 14 }, `step ${layer + 1}`),
      skipped > 0 && [
        s("line", { class: "break", x1: middle, x2: middle, y1: top + 34, y2: bottom }),
        s("text", { class: "column skipped", x: middle, y: top + 28 }, `${which}: none`),
      ],
    ];
  });
}

function faded(edge, chosen, member) {
  if (member !== null) return !edge.members.includes(member);
  return chosen !== null && edge.source !== chosen && edge.target !== chosen;
}

function endPlaces(edges, wide, height) {
  const found = ["won", "lost"].filter((outcome) => edges.some((edge) => edge.outcome === outcome));
  return Object.fromEntries(found.map((outcome, i) => [outcome, [wide - 40, ((i + 1) * (height + 20)) / (found.length + 1), END]]));
}

function edgeView(edge, shape, tint, value, isFaded) {
  const line = s("path", { class: "edge", d: shape.d, "stroke-width": width(edge.count), "data-source": edge.source, "data-target": edge.target ?? edge.outcome });
  const head = s("path", { class: "head", d: shape.head });
  line.style.setProperty("stroke", tint);
  head.style.setProperty("fill", tint);
  return s("g", { class: isFaded ? "fade faded" : "fade" }, s("title", null, `${edge.action}\ntaken ${edge.count}×, advantage ${signed(value)}`), line, head);
}

function endView(outcome, x, y) {
  return s("g", { class: "node end" }, s("rect", { x: x - 20, y: y - 12, width: 40, height: 24, rx: 6 }), s("text", { x, y }, outcome));
}

function nodeView(state, [x, y, r], isChosen, isFaded, pick) {
  const count = state.steps.length;
  const kind = ["node", count === 1 && "lone", isChosen && "chosen", isFaded && "faded"].filter(Boolean).join(" ");
  const label = `State ${state.state}: ${count} ${count === 1 ? "step" : "steps"}, mean return ${decimals(state.mean_return)}. ${clip(state.observation, 140)}`;
  const node = s(
    "g",
    { class: kind, tabindex: "0", role: "button", "aria-label": label, "aria-pressed": isChosen ? "true" : "false", "data-state": state.state },
    s("title", null, label),
    s("circle", { cx: x, cy: y, r }),
    s("text", { x, y }, state.state),
  );
  node.addEventListener("click", () => pick(state.state));
  node.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    pick(state.state);
  });
  return node;
}
