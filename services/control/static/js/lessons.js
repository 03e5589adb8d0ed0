// What the Anchor explorer explains. No algorithm is known here by name: its formulas and their terms are what the run's
// estimator says of itself (`group.algorithm`), and the numbers are those of the group at hand.

import { h, table } from "./dom.js";
import { clip, fixed, signed } from "./format.js";
import { colour } from "./graph.js";
import { advantage, level, outcome } from "./parts.js";

const formula = (parts, why) => h("p", { class: "formula" }, parts, h("span", { class: "why" }, why));
const muted = (...parts) => h("p", { class: "small muted" }, ...parts);

const brackets = (value) => (value < 0 ? `(${fixed(value)})` : fixed(value));

const NAME = /([A-Za-zα-ωΑ-ΩΣ]+)(?:_(\{[^}]*\}|\w))?|\^(\{[^}]*\}|\w)/gu;
const unbraced = (text) => text.replace(/^\{|\}$/g, "");

/** A formula as text with names in italics: single letters, what has a subscript, and the terms that are explained. */
function typeset(text, terms) {
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(NAME)) {
    const [whole, name, below, above] = found;
    parts.push(text.slice(end, found.index));
    end = found.index + whole.length;
    if (above) parts.push(h("sup", null, unbraced(above)));
    else if (below) parts.push(h("i", null, name), h("sub", null, unbraced(below)));
    else parts.push(name.length === 1 && name !== "Σ" || terms.has(name) ? h("i", null, name) : name);
  }
  return [...parts, text.slice(end)];
}

const termsOf = (about) => new Map((about?.terms ?? []).map((one) => [one.term, one.meaning]));

/** The formulas of some levels, and below them what their terms mean; `others`: also the terms of no formula. */
function explained(about, levels, others = false) {
  const terms = termsOf(about);
  const lines = about.formulas.filter((line) => levels.includes(line.level));
  const names = (line) => [...line.formula.matchAll(NAME)].flatMap(([whole, name]) => [whole, name]);
  const used = new Set(lines.flatMap(names));
  const everywhere = new Set(about.formulas.flatMap(names));
  const told = [...terms].filter(([name]) => used.has(name) || (others && !everywhere.has(name)));
  return [
    lines.map((line) => formula(typeset(line.formula, terms), line.meaning)),
    told.length > 0 && muted(told.map(([name, meaning], i) => [i > 0 && "; ", everywhere.has(name) ? typeset(name, terms) : name, `: ${meaning}`])),
  ];
}

/** Whether the algorithm compares the actions taken in one state; without its word, whether any step has such a level. */
export const comparesSteps = (group) =>
  group.algorithm?.step_level ?? group.states.some((state) => state.steps.some((step) => step.step_advantage !== 0));

/** The idea in three sentences. */
export const idea = () =>
  h(
    "div",
    { class: "prose" },
    h("p", null, "The policy learns by comparison with itself. It plays the same task several times: a ", h("strong", null, "group"), ". Episodes that did better than the others are encouraged as a whole, the others discouraged."),
    h("p", null, "Episodes of a group often come to the very same situation again: an ", h("strong", null, "anchor state"), ". There actions can be compared one by one: of all that was tried in this state, which led to more? That is the second level of algorithms such as GiGPO, a group within the group, and it needs no extra play and no learned critic."),
  );

/** What the run's algorithm makes of the episodes' scores. */
function episodeLevel(about) {
  if (!about) return muted("The run's folder does not say how its advantages were computed; the numbers are those it was trained with.");
  const named = muted(about.title, about.paper && `, ${about.paper}`);
  if (!about.formulas.length) return [named, explained(about, [], true)];
  const isLone = !about.formulas.some((line) => line.level === "episode");
  return [named, isLone && formula(typeset("A_E = 0", new Set()), "no episode level"), explained(about, ["episode"], true)];
}

/** Level one: the episodes of the group and their advantages. */
export function episodes(group, member, choose) {
  const columns = [
    { title: "Episode", cell: (row) => h("button", { type: "button", class: "quiet", "aria-pressed": row.member === member ? "true" : "false", onclick: () => choose(row.member === member ? null : row.member) }, row.member === member ? `◉ ${row.member + 1}` : `○ ${row.member + 1}`) },
    { title: "Outcome", cell: (row) => outcome(row.won) },
    { title: "Steps", num: true, cell: (row) => row.turns },
    { title: "Score", num: true, cell: (row) => row.reward.toFixed(1) },
    { title: level("E"), num: true, cell: (row) => advantage(row.episode_advantage) },
    { title: "", cell: (row) => h("a", { href: location.hash.replace(/explorer.*/, `trajectories/${row.group}/${row.member}`) }, "read") },
  ];
  return h(
    "section",
    { class: "card stack tight" },
    h("h2", null, "1 · The episodes against each other"),
    episodeLevel(group.algorithm),
    table("Episodes of the group", columns, group.trajectories, { rowClass: (row) => row.member === member && "chosen" }),
    h("p", { class: "small muted" }, "Choose an episode to see its path in the graph."),
  );
}

/** Level two, in general: what the run's algorithm makes of the steps, and of both levels together. */
export function returns(group) {
  const about = group.algorithm;
  const notice =
    !comparesSteps(group) &&
    h("p", { class: "notice" }, `This run was trained with ${about?.title ?? "an algorithm"}, which does not compare the actions within a state. The graph shows what could be compared, coloured by the steps' whole advantages.`);
  return [notice, about && explained(about, ["step", "total"])];
}

/** Share of a deviation from which a difference has its full colour. */
const FULL = 1.5;

/** The tables of a comparison: every estimator's advantages of each turn, and how they correlate. */
export function comparison(found, run) {
  const scaled = (value, deviation) => (deviation > 1e-9 ? value / deviation : 0);
  const cell = (turn, one, i) => {
    const value = turn.advantages[i];
    const difference = scaled(value, one.deviation) - scaled(turn.recorded, found.deviation);
    const box = h("span", { class: "compared", title: `${signed(difference)} deviations from what was trained` }, advantage(value));
    if (Math.abs(difference) > 0.05) box.style.setProperty("background", `color-mix(in oklab, ${colour(difference, FULL)} 45%, transparent)`);
    return box;
  };
  const columns = [
    { title: "Episode", cell: (row) => h("a", { href: `#/${run}/trajectories/${found.group}/${row.member}` }, row.member + 1) },
    { title: "Step", num: true, cell: (row) => row.number + 1 },
    { title: "State", num: true, cell: (row) => row.state },
    { title: "Action", cell: (row) => h("span", { class: "mono" }, clip(row.action, 60)) },
    { title: "trained", num: true, cell: (row) => advantage(row.recorded) },
    ...found.estimators.map((one, i) => ({ title: one.name, num: true, cell: (row) => cell(row, one, i) })),
  ];
  const shown = (value) => (value === null ? "–" : fixed(value));
  const agreement = [
    { title: "Algorithm", cell: (row) => row.name },
    { title: "Correlation with what was trained", num: true, cell: (row) => shown(row.correlation) },
    { title: "Steps with the other sign", num: true, cell: (row) => row.opposite },
    ...found.estimators.map((one, i) => ({ title: one.name, num: true, cell: (row) => shown(found.correlations[row.place][i]) })),
  ];
  return [
    muted("The advantage that every algorithm gives each step, from the same episodes, with the run's settings and what the algorithm's preset sets. Coloured by how far it is, in its own deviations, from what the run was trained with: blue above, orange below."),
    table("Advantages by algorithm", columns, found.turns),
    h("h3", null, "How far they agree"),
    table("Correlation of the algorithms", agreement, found.estimators.map((one, place) => ({ ...one, place }))),
  ];
}

const STEP = "A_S = (R_t − mean) / F";
const TOTAL = "A = A_E + ω A_S";

/** The formula with the numbers of the step of a state that stands out most, where the algorithm has this formula. */
export function worked(state, { algorithm: about, formula: settings }) {
  const has = (formula) => about?.formulas.some((line) => line.formula === formula);
  if (!settings || !has(STEP) || !has(TOTAL)) return null;
  const step = state.steps.reduce((best, one) => (Math.abs(one.step_advantage) > Math.abs(best.step_advantage) ? one : best));
  if (state.steps.length === 1) {
    return h("p", { class: "worked" }, `In state ${state.state} only one step was taken: there is nothing to compare it with, so its step level is 0 and the episode's advantage alone counts.`);
  }
  const divided = settings.normalisation === "std" ? ` / ${state.deviation.toFixed(2)}` : "";
  return h(
    "p",
    { class: "worked" },
    `For example in state ${state.state}: `,
    h("strong", null, step.action),
    ` in episode ${step.member + 1} led to a return of ${fixed(step.return)}; the mean here is ${fixed(state.mean_return)}, so `,
    level("S"),
    ` = (${fixed(step.return)} − ${brackets(state.mean_return)})${divided} = `,
    advantage(step.step_advantage),
    ", and ",
    level(),
    " = ",
    advantage(step.episode_advantage),
    ` + ${settings.omega} × (`,
    advantage(step.step_advantage),
    ") = ",
    advantage(step.advantage),
    ".",
  );
}
