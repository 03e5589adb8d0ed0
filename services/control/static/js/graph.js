// The graph of a group's anchor states. From left to right: when a state was first reached. Nodes are states, edges are
// actions: thicker where more steps took them, blue where they did better than the others there, orange where worse.

import { h, s } from "./dom.js";
import { clip, fixed as decimals, signed } from "./format.js";

const NARROWEST = 78;
const WIDEST = 124;
const ROW = 62;
const LEFT = 44;
const TOP = 66;
const SWEEPS = 6;

const radius = (visits) => Math.min(21, 9 + 2.4 * Math.sqrt(visits));

/** Colour of an advantage: grey at 0, to full blue or orange at `most`. */
export function colour(value, most) {
  const share = most > 0 ? Math.min(1, Math.abs(value) / most) : 0;
  return `color-mix(in oklab, var(${value < 0 ? "--minus" : "--plus"}) ${Math.round(100 * share ** 0.6)}%, var(--zero))`;
}

/** Places of the states: a column by first step, rows so that edges stay short. */
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

/** A curve between two circles, and the head of the arrow at its end. */
function curve([x1, y1], [x2, y2], r1, r2, width, lane) {
  const [dx, dy] = [x2 - x1, y2 - y1];
  const far = Math.hypot(dx, dy) || 1;
  const bend = Math.min((dx > 0 && dx < 1.5 * NARROWEST ? 0.08 : 0.22) * far, 92) + 13 * Math.min(lane, 5);
  const side = dx < 0 ? 1 : -1;
  const [nx, ny] = [(-dy / far) * bend * side, (dx / far) * bend * side];
  const [cx, cy] = [(x1 + x2) / 2 + nx, (y1 + y2) / 2 + ny];
  const out = Math.hypot(cx - x1, cy - y1) || 1;
  const inn = Math.hypot(x2 - cx, y2 - cy) || 1;
  const [ux, uy] = [(x2 - cx) / inn, (y2 - cy) / inn];
  const size = 5 + width;
  const [ex, ey] = [x2 - ux * (r2 + 2), y2 - uy * (r2 + 2)];
  const [bx, by] = [ex - ux * size, ey - uy * size];
  const start = [x1 + ((cx - x1) / out) * r1, y1 + ((cy - y1) / out) * r1];
  return {
    d: `M${start.map(fix)}Q${[cx, cy].map(fix)} ${[bx, by].map(fix)}`,
    head: `M${[ex, ey].map(fix)}L${[bx - uy * size * 0.5, by + ux * size * 0.5].map(fix)}L${[bx + uy * size * 0.5, by - ux * size * 0.5].map(fix)}Z`,
  };
}

const fix = (value) => value.toFixed(1); // pixels

function loop([x, y], r, lane, width) {
  const far = Math.min(lane, 6);
  const high = 18 + 6 * far;
  const size = 5 + width;
  return {
    d: `M${fix(x - r * 0.6)} ${fix(y - r * 0.8)}C${fix(x - 14 - 4 * far)} ${fix(y - r - high)} ${fix(x + 14 + 4 * far)} ${fix(y - r - high)} ${fix(x + r * 0.6 + 1)} ${fix(y - r * 0.8 - size + 2)}`,
    head: `M${fix(x + r * 0.6)} ${fix(y - r * 0.8)}l${fix(-size * 0.3)} ${fix(-size)}l${fix(size)} ${fix(size * 0.2)}Z`,
  };
}

const width = (count) => 1 + 1.5 * Math.sqrt(count);

/**
 * The drawing. `chosen`: number of a state; `member`: an episode whose path stands out; `pick(state)` is called when a
 * person chooses one; `room`: pixels there are, more is scrolled.
 */
export function draw(group, { chosen, member, pick, room }) {
  const { states, edges } = group;
  const { place, columns, column, width: wide, height } = layout(states, edges, room);
  const visits = new Map(states.map((one) => [one.state, one.steps.length]));
  const most = Math.max(...edges.map((edge) => Math.abs(edge.step_advantage)), 1e-9);
  const ends = endPlaces(edges, wide, height);
  const lanes = new Map();
  const drawn = edges.map((edge) => {
    const key = `${edge.source} ${edge.target ?? edge.outcome}`;
    const lane = lanes.get(key) ?? 0;
    lanes.set(key, lane + 1);
    return edgeView(edge, place, visits, ends, lane, most, faded(edge, chosen, member));
  });
  const svg = s(
    "svg",
    { width: wide, height: height + 24, role: "group", "aria-label": "Anchor states, from left to right in the order in which they were first reached" },
    columns.map((list, i) => s("text", { class: "column", x: LEFT + i * column, y: 14 }, `step ${states.find((one) => one.state === list[0]).layer + 1}`)),
    drawn,
    Object.entries(ends).map(([outcome, [x, y]]) => endView(outcome, x, y)),
    states.map((one) => nodeView(one, place.get(one.state), one.state === chosen, member !== null && !one.steps.some((step) => step.member === member), pick)),
  );
  return h("div", { class: "graph" }, svg);
}

function faded(edge, chosen, member) {
  if (member !== null) return !edge.members.includes(member);
  return chosen !== null && edge.source !== chosen && edge.target !== chosen;
}

function endPlaces(edges, wide, height) {
  const found = ["won", "lost"].filter((outcome) => edges.some((edge) => edge.outcome === outcome));
  return Object.fromEntries(found.map((outcome, i) => [outcome, [wide - 40, ((i + 1) * (height + 20)) / (found.length + 1)]]));
}

function edgeView(edge, place, visits, ends, lane, most, isFaded) {
  const thick = width(edge.count);
  const from = place.get(edge.source);
  const r1 = radius(visits.get(edge.source));
  const shape =
    edge.target === edge.source
      ? loop(from, r1, lane, thick)
      : edge.target === null
        ? curve(from, ends[edge.outcome], r1, 19, thick, lane)
        : curve(from, place.get(edge.target), r1, radius(visits.get(edge.target)), thick, lane);
  const tint = colour(edge.step_advantage, most);
  const line = s("path", { class: "edge", d: shape.d, "stroke-width": thick });
  const head = s("path", { class: "head", d: shape.head });
  line.style.setProperty("stroke", tint);
  head.style.setProperty("fill", tint);
  return s("g", { class: isFaded ? "fade faded" : "fade" }, s("title", null, `${edge.action}\ntaken ${edge.count}×, step advantage ${signed(edge.step_advantage)}`), line, head);
}

function endView(outcome, x, y) {
  return s("g", { class: "node end" }, s("rect", { x: x - 20, y: y - 12, width: 40, height: 24, rx: 6 }), s("text", { x, y }, outcome));
}

function nodeView(state, [x, y], isChosen, isFaded, pick) {
  const count = state.steps.length;
  const kind = ["node", count === 1 && "lone", isChosen && "chosen", isFaded && "faded"].filter(Boolean).join(" ");
  const label = `State ${state.state}: ${count} ${count === 1 ? "step" : "steps"}, mean return ${decimals(state.mean_return)}. ${clip(state.observation, 140)}`;
  const node = s(
    "g",
    { class: kind, tabindex: "0", role: "button", "aria-label": label, "aria-pressed": isChosen ? "true" : "false", "data-state": state.state },
    s("title", null, label),
    s("circle", { cx: x, cy: y, r: radius(count) }),
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
