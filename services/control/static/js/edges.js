// Lays out the edges of the graph: a curve if one avoids every other node, else a line around all nodes.

const SAMPLES = 24;
const CLEAR = 4;
const LANE = 7;
const CORNER = 12;
const BENDS = [1, -1, 1.8, -1.8, 2.8, -2.8];

const fix = (value) => value.toFixed(1); // pixels
const at = (point) => point.map(fix).join(" ");

/** The head of an arrow to `end` in the direction [ux, uy] (a unit vector), and the point where its line ends. */
function arrow(end, [ux, uy], width) {
  const size = 5 + width;
  const base = [end[0] - ux * size, end[1] - uy * size];
  const wings = [1, -1].map((side) => [base[0] - side * uy * size * 0.5, base[1] + side * ux * size * 0.5]);
  return { base, head: `M${at(end)}L${at(wings[0])}L${at(wings[1])}Z` };
}

/** A curve between two circles. Its control point is `bend` pixels to the left of the straight line (right if < 0). */
function curve([x1, y1], [x2, y2], r1, r2, width, bend) {
  const far = Math.hypot(x2 - x1, y2 - y1) || 1;
  const control = [(x1 + x2) / 2 - ((y2 - y1) / far) * bend, (y1 + y2) / 2 + ((x2 - x1) / far) * bend];
  const out = Math.hypot(control[0] - x1, control[1] - y1) || 1;
  const inn = Math.hypot(x2 - control[0], y2 - control[1]) || 1;
  const along = [(x2 - control[0]) / inn, (y2 - control[1]) / inn];
  const { base, head } = arrow([x2 - along[0] * (r2 + 2), y2 - along[1] * (r2 + 2)], along, width);
  const start = [x1 + ((control[0] - x1) / out) * r1, y1 + ((control[1] - y1) / out) * r1];
  const points = Array.from({ length: SAMPLES + 1 }, (_, i) => {
    const t = i / SAMPLES;
    return [0, 1].map((axis) => (1 - t) ** 2 * start[axis] + 2 * t * (1 - t) * control[axis] + t ** 2 * base[axis]);
  });
  return { d: `M${at(start)}Q${at(control)} ${at(base)}`, head, points };
}

/** A line with round corners: out of the first column, above or below all nodes, into the second column. */
function around([x1, y1], [x2, y2], r1, r2, width, gap, y) {
  const way = x2 < x1 ? -1 : 1;
  const [left, right] = [x1 + way * gap, x2 === x1 ? x1 + gap : x2 - way * gap];
  const isNear = x2 === x1 || Math.abs(right - left) < 2 * CORNER; // the gap beside one column leads to both nodes
  const into = x2 === x1 ? -1 : way;
  const { base, head } = arrow([x2 - into * (r2 + 2), y2], [into, 0], width);
  const middle = isNear ? [[left, y1], [left, y2]] : [[left, y1], [left, y], [right, y], [right, y2]];
  const corners = [[x1 + way * r1, y1], ...middle, base];
  const d = corners.slice(1, -1).map((corner, i) => {
    const [before, after] = [corners[i], corners[i + 2]];
    const toward = (other) => {
      const far = Math.hypot(other[0] - corner[0], other[1] - corner[1]) || 1;
      const share = Math.min(CORNER, far / 2) / far;
      return [corner[0] + (other[0] - corner[0]) * share, corner[1] + (other[1] - corner[1]) * share];
    };
    return `L${at(toward(before))}Q${at(corner)} ${at(toward(after))}`;
  });
  return { d: `M${at(corners[0])}${d.join("")}L${at(base)}`, head, points: corners };
}

/** An edge from a state to itself: a loop above it. */
export function loop([x, y], r, width, lane) {
  const far = Math.min(lane, 6);
  const high = 18 + 6 * far;
  const size = 5 + width;
  return {
    d: `M${fix(x - r * 0.6)} ${fix(y - r * 0.8)}C${fix(x - 14 - 4 * far)} ${fix(y - r - high)} ${fix(x + 14 + 4 * far)} ${fix(y - r - high)} ${fix(x + r * 0.6 + 1)} ${fix(y - r * 0.8 - size + 2)}`,
    head: `M${fix(x + r * 0.6)} ${fix(y - r * 0.8)}l${fix(-size * 0.3)} ${fix(-size)}l${fix(size)} ${fix(size * 0.2)}Z`,
    points: [[x, y - r - high]],
  };
}

/**
 * Returns a function that lays edges among `nodes` ([x, y, radius]) in columns `column` pixels apart. `lay(from, to,
 * width, lane)` returns {d, head, points}: path, arrow head and points along it. `lane` numbers edges of the same pair.
 */
export function router(nodes, column) {
  const [top, bottom] = [Math.min(...nodes.map(([, y, r]) => y - r)), Math.max(...nodes.map(([, y, r]) => y + r))];
  const lanes = { above: 0, below: 0 };
  return function lay(from, to, width, lane) {
    const [dx, dy] = [to[0] - from[0], to[1] - from[1]];
    const far = Math.hypot(dx, dy) || 1;
    const others = nodes.filter((node) => node !== from && node !== to);
    const isFree = ({ points }) =>
      others.every(([x, y, r]) => points.every(([px, py]) => Math.hypot(px - x, py - y) > r + CLEAR + width / 2));
    const side = dx < 0 ? 1 : -1;
    const natural = Math.min((dx > 0 && dx < 1.5 * column ? 0.08 : 0.22) * far, 92) + 13 * Math.min(lane, 5);
    for (const factor of BENDS) {
      const shape = curve(from, to, from[2], to[2], width, side * factor * Math.max(natural, Math.abs(factor) > 1 ? 18 : 0));
      if (isFree(shape)) return shape;
    }
    const isAbove = (from[1] + to[1]) / 2 <= (top + bottom) / 2;
    const number = isAbove ? lanes.above++ : lanes.below++;
    const y = isAbove ? top - 14 - LANE * number : bottom + 14 + LANE * number;
    return around(from, to, from[2], to[2], width, column / 2 + 3 * ((number % 5) - 2), y);
  };
}
