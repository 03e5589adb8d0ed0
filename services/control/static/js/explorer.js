// The page "Anchor explorer": one group in detail, to show which actions are compared with each other.

import { h, s, show, table } from "./dom.js";
import { clip, fixed, length, percent, versions, words } from "./format.js";
import { colour, draw } from "./graph.js";
import * as lessons from "./lessons.js";
import { advantage, bar, choices, level, nothingKept, select } from "./parts.js";

const LISTED = 200;

/** The filters of the list of groups. They are kept as long as the run stays the same. */
let filters = { run: null };

function filtersOf(run) {
  if (filters.run !== run) filters = { run, asked: { task_type: "", success: "some", update: "" } };
  return filters.asked;
}

/** The advantage to show: that of the step level or, for an estimator without one, the whole advantage. */
const compared = (group) => (lessons.comparesSteps(group) ? "step_advantage" : "advantage");

/** The most informative state: many steps with different returns. */
function telling(states) {
  return states.reduce((best, state) => (state.deviation * Math.sqrt(state.steps.length) > best.deviation * Math.sqrt(best.steps.length) ? state : best)).state;
}

function byAction(state, name) {
  const actions = [...Map.groupBy(state.steps, (step) => step.action).entries()].map(([action, steps]) => ({
    action,
    steps,
    mean: steps.reduce((sum, step) => sum + step.return, 0) / steps.length,
    level: steps.reduce((sum, step) => sum + step[name], 0) / steps.length,
    valid: steps.every((step) => step.valid),
  }));
  return actions.sort((a, b) => b.level - a.level);
}

function statePanel(shared, group, number) {
  const state = group.states.find((one) => one.state === number);
  const name = compared(group);
  const actions = byAction(state, name);
  const most = Math.max(...actions.map((one) => Math.abs(one.level)), 1e-9);
  const through = [...Map.groupBy(state.steps, (step) => step.member).entries()];
  const columns = [
    { title: "Action taken here", cell: (row) => [h("span", { class: "mono" }, row.action), !row.valid && " ", !row.valid && h("span", { class: "badge bad" }, "invalid")] },
    { title: "Times", num: true, cell: (row) => row.steps.length },
    { title: "Mean return", num: true, cell: (row) => fixed(row.mean) },
    { title: ["Mean ", level(name === "step_advantage" ? "S" : null)], num: true, cell: (row) => advantage(row.level) },
    { title: "", cell: (row) => h("div", { class: "adv-bar" }, bar(row.level, most)) },
  ];
  const each = [
    { title: "Episode", cell: (row) => h("a", { href: `#/${shared.name}/trajectories/${group.summary.group}/${row.member}` }, row.member + 1) },
    { title: "Step", num: true, cell: (row) => row.number + 1 },
    ...(state.steps.some((step) => step.calls.length > 1) ? [{ title: "Calls", cell: (row) => row.calls.map((call) => call + 1).join(", ") }] : []),
    { title: "Action", cell: (row) => h("span", { class: "mono" }, row.action) },
    { title: "Return", num: true, cell: (row) => fixed(row.return) },
    { title: level("E"), num: true, cell: (row) => advantage(row.episode_advantage) },
    { title: level("S"), num: true, cell: (row) => advantage(row.step_advantage) },
    { title: level(), num: true, cell: (row) => advantage(row.advantage) },
  ];
  return [
    h("h2", { id: "state-title" }, `3 · State ${number}: ${state.steps.length === 1 ? "one step" : `${state.steps.length} steps`} of ${through.length === 1 ? "one episode" : `${through.length} episodes`}`),
    h("p", { class: "said" }, state.observation),
    table(`Actions taken in state ${number}`, columns, actions),
    h("details", { open: state.steps.length <= 8 }, h("summary", null, "All steps taken here"), table(`Steps taken in state ${number}`, each, state.steps)),
  ];
}

function legend(group) {
  const { states } = group;
  const layers = new Set(states.map((state) => state.layer));
  const isGappy = layers.size <= Math.max(...layers);
  const id = "advantage-scale";
  const stops = [-1, -0.5, 0, 0.5, 1].map((value, i) => {
    const stop = s("stop", { offset: `${25 * i}%` });
    stop.style.setProperty("stop-color", colour(value, 1));
    return stop;
  });
  return h(
    "p",
    { class: "scale" },
    lessons.comparesSteps(group) ? "worse than the others there" : "lower advantage",
    s("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, s("defs", null, s("linearGradient", { id }, stops)), s("rect", { width: 100, height: 10, rx: 3, fill: `url(#${id})` })),
    "better · thicker: taken more often · larger: visited more often",
    isGappy && " · dashed: steps that reached no new state",
  );
}

function statesTable(group, choose) {
  const columns = [
    { title: "State", cell: (row) => h("button", { type: "button", class: "quiet", onclick: () => choose(row.state) }, row.state) },
    { title: "Observation", cell: (row) => clip(row.observation, 110) },
    { title: "Steps", num: true, cell: (row) => row.steps.length },
    { title: "Actions", num: true, cell: (row) => new Set(row.steps.map((step) => step.action)).size },
    { title: "Mean return", num: true, cell: (row) => fixed(row.mean_return) },
    { title: "Spread", num: true, cell: (row) => row.deviation.toFixed(2) },
  ];
  const rows = group.states.toSorted((a, b) => b.steps.length - a.steps.length);
  return h("details", null, h("summary", null, "The states as a table"), table("Anchor states", columns, rows));
}

/** A section that compares the group by all algorithms when it is asked to. */
function comparison(shared, group, visit) {
  const result = h("div", { class: "stack", "aria-live": "polite" });
  const load = async () => {
    show(result, h("p", { class: "muted" }, "Computing …"));
    const path = `/runs/${encodeURIComponent(shared.name)}/groups/${group.summary.group}/comparison`;
    const shown = await visit.get(path).then(
      (found) => lessons.comparison(found, shared.name),
      (error) => {
        if (visit.ended() || error.status === 401) throw error;
        return h("p", { class: "error", role: "alert" }, error.message);
      },
    );
    show(result, shown);
  };
  const button = h("button", { type: "button", onclick: () => visit.attempt(load()) }, "Compare all algorithms");
  return h("section", { class: "card stack tight", "aria-label": "Comparison of algorithms" }, h("h2", null, "4 · What the other algorithms would have said"), h("div", { class: "row" }, button), result);
}

function view(shared, place, group, startAt, visit) {
  const chosen = { state: startAt ?? telling(group.states), member: null };
  const { summary } = group;
  const graph = h("div");
  const first = h("div");
  const example = h("div", { "aria-live": "polite" });
  const panel = h("section", { class: "card stack", "aria-labelledby": "state-title", "aria-live": "polite" });
  const redraw = (focus) => {
    const scrolled = graph.firstChild?.scrollLeft ?? 0;
    show(graph, draw(group, { chosen: chosen.state, member: chosen.member, room: graph.clientWidth, value: (edge) => edge[compared(group)], pick: (state) => ((chosen.state = state), redraw(state)) }));
    graph.firstChild.scrollLeft = scrolled;
    if (focus !== undefined) graph.querySelector(`[data-state="${focus}"]`)?.focus();
    show(first, lessons.episodes(group, chosen.member, (member) => ((chosen.member = member), redraw())));
    show(panel, statePanel(shared, group, chosen.state));
    show(example, lessons.worked(group.states.find((one) => one.state === chosen.state), group));
  };
  const choose = (state) => ((chosen.state = state), redraw(), panel.scrollIntoView({ block: "nearest" }));
  const lone = group.states.filter((state) => state.steps.length === 1).length;
  show(
    place,
    h("p", null, `Group ${summary.group}: `, h("strong", null, words(summary.task_type)), `, ${summary.episodes} episodes, ${summary.won} won; ${length(summary)} in ${summary.step_groups} anchor states, ${lone} of them visited once. Sampled by policy ${versions(summary)}, trained on in update ${summary.update}.`),
    h("div", { class: "levels" }, first, h("section", { class: "card stack tight" }, h("h2", null, "2 · The actions within one state"), lessons.returns(group), h("p", { class: "small muted" }, "In the graph, a state with several outgoing arrows is one in which the agent tried different actions. Blue arrows led to more than the average, orange ones to less. Choose a state to see its numbers."), example)),
    h("section", { class: "card stack tight", "aria-label": "Graph of anchor states" }, h("h2", null, "The group as a graph"), legend(group), graph, statesTable(group, choose)),
    panel,
    comparison(shared, group, visit),
  );
  redraw();
}

export async function render(main, shared, rest, visit) {
  const path = `/runs/${encodeURIComponent(shared.name)}/groups`;
  const asked = filtersOf(shared.name);
  const place = h("div", { class: "stack" }, h("p", { class: "muted" }, "Loading …"));
  const group = h("select", { onchange: (event) => go(event.target.value) });
  const go = (number) => (location.hash = `#/${shared.name}/explorer/${number}`);
  const name = (one) => `${one.group} · ${words(one.task_type)} · ${percent(one.won / one.episodes, 0)} won · update ${one.update}`;
  let answer = await visit.get(path, { ...asked, limit: LISTED });
  let opened = 0;
  let asking = 0;

  function list(current) {
    const listed = answer.groups.map((one) => [String(one.group), name(one)]);
    if (!listed.some(([key]) => key === String(current ?? ""))) listed.unshift([String(current ?? ""), current === undefined ? "no matching group" : `${current}`]);
    show(group, choices(listed, String(current ?? "")));
  }

  /** Show the group of the address or, if it names none, the first of the list. */
  async function choose([number, state]) {
    const turn = (opened += 1);
    const current = number === undefined ? answer.groups[0]?.group : Number(number);
    list(current);
    if (current === undefined) return show(place, h("p", { class: "notice" }, "No kept group matches the filters."));
    const found = await visit.get(`${path}/${current}`);
    if (turn === opened) view(shared, place, found, state === undefined ? undefined : Number(state), visit);
    return undefined;
  }

  async function ask(name, value) {
    asked[name] = value;
    const turn = (asking += 1);
    const found = await visit.get(path, { ...asked, limit: LISTED });
    if (turn !== asking) return undefined; // a later filter has replaced this one
    answer = found;
    const first = answer.groups[0]?.group;
    const before = location.hash;
    if (first !== undefined) go(first);
    return location.hash === before ? choose([first]) : list(first);
  }

  if (answer.first_update === null) return show(main, h("h1", null, "Anchor explorer"), lessons.idea(), nothingKept());
  const filter = (name) => (value) => visit.attempt(ask(name, value));
  const update = h("input", { type: "number", min: "1", inputmode: "numeric", value: asked.update, placeholder: "all", onchange: (event) => filter("update")(event.target.value) });
  const bar_ = h(
    "div",
    { class: "row", role: "search", "aria-label": "Choose a group" },
    select("Task type", [["", "all"], ...answer.task_types.map((type) => [type, words(type)])], asked.task_type, filter("task_type")),
    select("Success", [["", "all"], ["some", "some won, some lost"], ["all", "all won"], ["none", "all lost"]], asked.success, filter("success")),
    h("label", { class: "field" }, "Update", update),
    h("label", { class: "field" }, "Group", group),
  );
  show(main, h("h1", null, "Anchor explorer"), h("section", { class: "card stack", "aria-label": "What this page shows" }, lessons.idea(), bar_), place);
  visit.follow = choose;
  return choose(rest);
}
