// The page "Run": figures and curves of the training, updated while the run is live.

import { chart, smooth } from "./chart.js";
import { h, show, table } from "./dom.js";
import { bytes, clock, percent, seconds, short } from "./format.js";

const points = (records, name) => records.filter((r) => r[name] !== undefined && r[name] !== null).map((r) => [r.step, r[name]]);
const whole = (value) => percent(value, 0);

function smoothed(records, name, label, mark) {
  const raw = points(records, name);
  return { name: label, mark, points: smooth(raw), faint: raw };
}

const plain = (name, label, mark = "c1") => (records) => [{ name: label, mark, points: points(records, name) }];
const softened = (name, label, mark = "c1") => (records) => [smoothed(records, name, label, mark)];

function success(records) {
  const panels = records.filter((r) => r["evaluation/success_rate"] !== undefined);
  const band = panels.map((r) => [r.step, r["evaluation/success_low"], r["evaluation/success_high"]]);
  return [
    smoothed(records, "rollout/success_rate", "training", "c1"),
    { name: "evaluation", mark: "c2", points: points(panels, "evaluation/success_rate"), band, dots: true },
  ];
}

const CLASSES = [["1", "lone step", "q1"], ["2_to_4", "2–4 steps", "q2"], ["5_to_8", "5–8", "q3"], ["9_up", "9 or more", "q4"]];
const SHARES = CLASSES.map(([key, name, mark]) => [`advantage/step_groups_${key}`, name, mark]);
const TIMES = [["time/update_s", "update", "c1"], ["time/wait_s", "wait", "c2"], ["time/prepare_s", "prepare", "c3"], ["time/publish_s", "publish", "c4"]];

/** Response tokens of an update's groups, divided by the time since the previous update. */
function rollouts(records) {
  const took = (record) => TIMES.reduce((sum, [name]) => sum + (record[name] ?? 0), 0);
  const rates = records.filter((r) => r["update/response_tokens"] > 0 && took(r) > 0).map((r) => [r.step, r["update/response_tokens"] / took(r)]);
  return [{ name: "tokens/s", mark: "c1", points: smooth(rates), faint: rates }];
}

const several = (list) => (records) => list.map(([key, name, mark]) => ({ name, mark, points: points(records, key) }));

const SECTIONS = [
  ["Is it learning?", [
    [{ title: "Success rate", hint: "Training: smoothed. Evaluation: with its 95 % interval.", format: whole, min: 0, max: 1, wide: true }, success],
    [{ title: "Reward per episode", hint: "Undiscounted.", min: 0 }, softened("rollout/mean_reward", "reward")],
    [{ title: "Valid actions", hint: "Share of all steps.", format: whole, max: 1 }, softened("rollout/valid_fraction", "valid")],
  ]],
  ["What there is to compare", [
    [{ title: "Step groups by size", hint: "Share of anchor states by the number of steps taken in them. A lone step has no step-level advantage.", stacked: true, format: whole, max: 1, wide: true, empty: "this run recorded only the mean size" }, several(SHARES)],
    [{ title: "Mean step-group size", hint: "Steps taken in an anchor state.", min: 0 }, softened("advantage/step_group_size", "steps")],
    [{ title: "Spread of advantages", hint: "Standard deviation over all steps.", min: 0 }, softened("advantage/deviation", "deviation")],
  ]],
  ["Is the policy changing steadily?", [
    [{ title: "KL to the reference policy", hint: "Nats per token.", min: 0, empty: "not recorded: loss.kl_coef is 0" }, softened("loss/kl", "KL")],
    [{ title: "Clip fraction", hint: "Share of tokens whose ratio is clipped.", format: (v) => percent(v, 1), min: 0 }, softened("loss/clip_fraction", "clipped")],
    [{ title: "Entropy", hint: "Nats per token.", min: 0, empty: "not recorded" }, softened("loss/entropy", "entropy")],
    [{ title: "Sampler against learner", hint: "Mean difference of log-probabilities of the same tokens, in nats.", min: 0 }, softened("loss/logprob_gap", "gap")],
  ]],
  ["Is the hardware busy?", [
    [{ title: "Time of an update", hint: "Long waits for groups mean that the actors are the bottleneck.", stacked: true, format: (v) => `${short(v)} s` }, several(TIMES)],
    [{ title: "Rollout throughput", hint: "Response tokens trained on, per second of the whole update.", min: 0, empty: "not recorded" }, rollouts],
    [{ title: "Learner throughput", hint: "Prompt and response tokens, per second of the ranks' work.", min: 0 }, softened("time/tokens_per_second", "tokens/s")],
    [{ title: "Staleness of groups", hint: "Updates between playing and training.", min: 0 }, several([["staleness/max", "oldest", "c2"], ["staleness/mean", "mean", "c1"]])],
  ]],
  ["More", [
    [{ title: "Steps per episode", min: 0 }, softened("rollout/mean_steps", "steps")],
    [{ title: "Gradient norm", min: 0 }, softened("loss/grad_norm", "norm")],
    [{ title: "Learning rate", min: 0 }, plain("loss/learning_rate", "rate")],
    [{ title: "Groups given up", min: 0 }, several([["staleness/dropped_groups", "too old", "c2"], ["dispatch/cancelled_groups", "cancelled", "c4"]])],
  ]],
];

function tiles(shared) {
  const { records, facts } = shared;
  const run = facts.run;
  const newest = (name) => records.findLast((r) => r[name] !== undefined && r[name] !== null)?.[name];
  const first = records.find((r) => r["evaluation/success_rate"] !== undefined)?.["evaluation/success_rate"];
  const evaluation = newest("evaluation/success_rate");
  const since = first !== undefined && evaluation !== first ? `, first ${percent(first)}` : "";
  const smoothSuccess = smooth(points(records, "rollout/success_rate")).at(-1)?.[1];
  const times = TIMES.map(([name]) => newest(name) ?? 0).reduce((a, b) => a + b, 0);
  const items = [
    ["Update", run ? `${run.update}` : "–", run?.updates ? `of ${run.updates}` : ""],
    ["Success, evaluation", percent(evaluation), `newest panel${since}`],
    ["Success, training", percent(smoothSuccess), "smoothed over updates"],
    ["Valid actions", percent(newest("rollout/valid_fraction")), "newest update"],
    ["Step-group size", short(newest("advantage/step_group_size")), "mean of the newest update"],
    ["Learner", short(newest("time/tokens_per_second")), "tokens/s, newest update"],
    ["Update time", times ? seconds(times) : "–", "newest update"],
  ];
  return items.map(([name, value, more]) => h("div", { class: "tile card" }, h("dt", null, name), h("dd", null, value), more && h("dd", { class: "small" }, more)));
}

/** The warnings of the training signal, newest first; null if there are none. */
function warningList(warnings) {
  if (!warnings?.length) return null;
  const line = ({ update, text }) => {
    const prefix = `update ${update}: `; // the heading of the line has it already
    return h("li", null, h("strong", null, `Update ${update}: `), text.startsWith(prefix) ? text.slice(prefix.length) : text);
  };
  return h(
    "section",
    { class: "error stack tight", "aria-live": "polite", "aria-labelledby": "warnings-title" },
    h("h2", { id: "warnings-title" }, warnings.length === 1 ? "1 warning" : `${warnings.length} warnings`),
    h("p", { class: "small muted" }, "Something was wrong with the training signal. Each kind of warning is given once, so the cause may have passed."),
    h("ul", null, warnings.map(line)),
  );
}

async function details(shared, visit) {
  const name = encodeURIComponent(shared.name);
  const [{ checkpoints }, { config }] = await Promise.all([visit.get(`/runs/${name}/checkpoints`), visit.get(`/runs/${name}/config`)]);
  const columns = [
    { title: "Version", num: true, cell: (row) => row.version },
    { title: "Size", num: true, cell: (row) => bytes(row.bytes) },
    { title: "Training time", num: true, cell: (row) => (row.training_seconds === null ? "–" : seconds(row.training_seconds)) },
    { title: "Written", cell: (row) => clock(row.written_at) },
  ];
  return [
    h("h2", null, "Checkpoints"),
    checkpoints.length ? h("div", { class: "compact" }, table("Checkpoints", columns, checkpoints)) : h("p", { class: "muted" }, "None yet."),
    h("details", null, h("summary", null, "Configuration"), h("pre", { tabindex: "0" }, JSON.stringify(config, null, 2))),
  ];
}

export async function render(main, shared, rest, visit) {
  const strip = h("dl", { class: "tiles" });
  const note = h("p", { class: "muted small" });
  const title = h("h1", null, shared.name);
  const warned = h("div");
  const charts = SECTIONS.map(([heading, list]) => [heading, list.map(([options, make]) => [chart(options), make])]);
  const more = h("section", { class: "card stack", "aria-label": "Checkpoints and configuration" });
  show(
    main,
    h("header", { class: "stack tight" }, title, note),
    warned,
    h("section", { "aria-label": "The run in figures" }, strip),
    charts.map(([heading, list]) =>
      h("section", { class: "stack" }, h("h2", null, heading), h("div", { class: "grid charts" }, list.map(([one]) => one.element))),
    ),
    more,
  );
  const redraw = () => {
    show(strip, tiles(shared));
    const run = shared.facts.run;
    note.textContent = run ? `${run.algorithm ?? "?"} on ${run.env ?? "?"} · ${run.note}` : "";
    for (const [, list] of charts) for (const [one, make] of list) one.update(make(shared.records));
  };
  const warn = () => show(warned, warningList(shared.facts.warnings?.warnings));
  visit.listen((event) => (event === "warnings" ? warn() : (event === "metrics" || event === "run") && redraw()));
  warn();
  redraw();
  show(more, await details(shared, visit));
}
