// Charts over updates as SVG: lines with a band, or stacked areas. A cursor (mouse, touch or arrow keys) shows the values
// as text, and every chart has a table.

import { h, s, show, table } from "./dom.js";
import { short } from "./format.js";

const MARGIN = { top: 8, right: 10, bottom: 22, left: 44 };
const HEIGHT = 176;

const onAxis = (value) => (Math.abs(value) >= 1e4 ? `${value / 1000} k` : Math.abs(value) < 1e-3 && value ? value.toExponential() : String(value));

/** Round values from low to high, about `count` of them. */
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

/** Exponential moving average with bias correction at the start. */
export function smooth(points, share = 0.8) {
  let [average, weight] = [0, 0];
  return points.map(([x, y]) => {
    average = share * average + (1 - share) * y;
    weight = share * weight + (1 - share);
    return [x, average / weight];
  });
}

/**
 * A chart that can be updated.
 *
 * options: {title, hint?, format?, min?, max?, stacked?, empty?}; the axis includes at least `min` and `max`.
 * update(series) takes series of {name, mark, points: [[x, y]], faint?: points, band?: [[x, low, high]], dots?: true};
 * with `faint` points, those are as recorded and `points` are smoothed.
 */
export function chart(options) {
  const format = options.format ?? short;
  const axis = options.format ?? onAxis;
  const svg = s("svg", { role: "img", tabindex: "0", "aria-label": `${options.title}: chart over updates; use the arrow keys to read values` });
  const readout = h("p", { class: "readout", "aria-live": "off" });
  const legend = h("ul", { class: "legend" });
  const numbers = h("details", { ontoggle: () => numbers.open && fillTable() }, h("summary", null, "As a table"));
  const figure = h(
    "figure",
    { class: options.wide ? "card chart wide" : "card chart" },
    h("figcaption", null, h("h3", null, options.title), options.hint && h("p", { class: "small muted" }, options.hint)),
    readout,
    svg,
    legend,
    numbers,
  );
  let series = [];
  let xs = [];
  let at = null;

  function fillTable() {
    const columns = [
      { title: "Update", num: true, cell: (x) => x },
      ...series.flatMap((one) => [
        { title: one.faint ? `${one.name}, smoothed` : one.name, num: true, cell: (x) => value(one.points, x) },
        one.faint && { title: `${one.name}, as recorded`, num: true, cell: (x) => value(one.faint, x) },
      ]),
    ].filter(Boolean);
    show(numbers, h("summary", null, "As a table"), table(`${options.title} by update`, columns, xs));
  }

  function value(points, x) {
    const found = x === null ? points.at(-1) : points.find((point) => point[0] === x);
    return found ? format(found[1]) : "–";
  }

  function scales(width) {
    const tops = options.stacked ? sums(series) : series.flatMap((one) => [...one.points, ...(one.faint ?? [])].map((point) => point[1]));
    const bands = series.flatMap((one) => (one.band ?? []).flatMap((point) => point.slice(1)));
    const all = [...tops, ...bands].filter(Number.isFinite);
    let low = all.reduce((least, one) => Math.min(least, one), options.min ?? Infinity);
    let high = all.reduce((most, one) => Math.max(most, one), options.max ?? -Infinity);
    if (options.stacked) low = 0;
    if (high - low < 1e-9) [low, high] = [low - (options.min === undefined ? 0.5 : 0), high + 0.5];
    const [first, last] = [xs[0], Math.max(xs[xs.length - 1], xs[0] + 1)];
    const inner = width - MARGIN.left - MARGIN.right;
    return {
      low, high, first, last,
      x: (x) => MARGIN.left + ((x - first) / (last - first)) * inner,
      y: (y) => MARGIN.top + (1 - (y - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom),
    };
  }

  function draw() {
    const width = svg.clientWidth || 360;
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!xs.length) return show(svg, s("text", { class: "tick", x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, options.empty ?? "no data yet"));
    const scale = scales(width);
    const rows = ticks(scale.low, scale.high, 4).map((y) => [
      s("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: scale.y(y), y2: scale.y(y) }),
      s("text", { class: "tick", x: MARGIN.left - 6, y: scale.y(y) + 4, "text-anchor": "end" }, axis(y)),
    ]);
    const columns = ticks(scale.first, scale.last, Math.max(4, Math.floor(width / 80)))
      .filter(Number.isInteger)
      .map((x) => s("text", { class: "tick", x: scale.x(x), y: HEIGHT - 6, "text-anchor": "middle" }, x));
    show(svg, rows, columns, options.stacked ? areas(series, scale) : series.map((one) => line(one, scale)), cursor(scale));
  }

  function cursor(scale) {
    if (at === null) return null;
    return s("line", { class: "cursor", x1: scale.x(at), x2: scale.x(at), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
  }

  function read() {
    const told = (one) => (one.faint ? `${value(one.points, at)} smoothed, ${value(one.faint, at)} recorded` : value(one.points, at));
    const parts = series.filter((one) => value(one.points, at) !== "–").map((one) => (series.length > 1 ? `${one.name} ${told(one)}` : told(one)));
    const text = xs.length ? `${at === null ? "now" : `update ${at}`}: ${parts.join(" · ") || "–"}` : "";
    if (readout.textContent !== text) readout.textContent = text;
  }

  function move(x) {
    at = x;
    draw();
    read();
  }

  svg.addEventListener("pointermove", (event) => {
    if (!xs.length) return;
    const box = svg.getBoundingClientRect();
    const { first, last } = scales(box.width);
    const wanted = first + ((event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right)) * (last - first);
    const nearest = xs.reduce((best, x) => (Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best), xs[0]);
    if (nearest !== at) move(nearest);
  });
  svg.addEventListener("pointerleave", () => move(null));
  // Announced while the user moves through the chart by keys, not at every new record.
  svg.addEventListener("focus", () => readout.setAttribute("aria-live", "polite"));
  svg.addEventListener("blur", () => {
    readout.setAttribute("aria-live", "off");
    move(null);
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !xs.length) return;
    event.preventDefault();
    const place = (at === null ? xs.length - 1 : xs.indexOf(at)) + (Number.isFinite(step) ? step : step > 0 ? xs.length : -xs.length);
    move(xs[Math.max(0, Math.min(xs.length - 1, place))]);
  });
  new ResizeObserver(() => draw()).observe(svg);

  return {
    element: figure,
    update(fresh) {
      series = fresh.filter((one) => one.points.length);
      xs = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
      show(legend, series.length > 1 ? series.map((one) => h("li", { class: one.mark }, one.name)) : null);
      draw();
      read();
      if (numbers.open) fillTable();
    },
  };
}

const path = (points, scale) => points.map(([x, y], i) => `${i ? "L" : "M"}${scale.x(x).toFixed(1)} ${scale.y(y).toFixed(1)}`).join("");

function line(one, scale) {
  const band = one.band?.length
    ? path([...one.band.map(([x, low]) => [x, low]), ...one.band.toReversed().map(([x, , high]) => [x, high])], scale)
    : null;
  return s(
    "g",
    { class: one.mark },
    band && s("path", { class: "band", d: `${band}Z` }),
    one.faint && s("path", { class: "line faint", d: path(one.faint, scale) }),
    s("path", { class: "line", d: path(one.points, scale) }),
    (one.dots || one.points.length === 1) && one.points.map(([x, y]) => s("circle", { class: "point", r: 3.2, cx: scale.x(x), cy: scale.y(y) })),
  );
}

function sums(series) {
  const totals = new Map();
  for (const one of series) for (const [x, y] of one.points) totals.set(x, (totals.get(x) ?? 0) + y);
  return [...totals.values()];
}

function areas(series, scale) {
  const base = new Map();
  return series.map((one) => {
    const lower = one.points.map(([x]) => [x, base.get(x) ?? 0]);
    const upper = one.points.map(([x, y]) => [x, (base.get(x) ?? 0) + y]);
    for (const [x, y] of upper) base.set(x, y);
    return s("g", { class: one.mark }, s("path", { class: "area", d: `${path([...upper, ...lower.reverse()], scale)}Z` }));
  });
}
