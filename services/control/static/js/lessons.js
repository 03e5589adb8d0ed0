// What the Anchor explorer explains: GiGPO's two levels, with the formulas and the numbers of the group at hand.

import { h, table } from "./dom.js";
import { fixed } from "./format.js";
import { advantage, level, outcome } from "./parts.js";

const v = (name, sub) => [h("i", null, name), sub && h("sub", null, sub)];
const formula = (parts, why) => h("p", { class: "formula" }, parts, h("span", { class: "why" }, why));

const brackets = (value) => (value < 0 ? `(${fixed(value)})` : fixed(value));

const scale = (settings) => (settings.normalisation === "std" ? "the standard deviation" : "1 (only centred)");

const NAMES = { gigpo: "GiGPO", hgpo: "HGPO", grpo: "GRPO", rloo: "RLOO", reinforce_pp: "REINFORCE++", dr_grpo: "Dr. GRPO", dapo: "DAPO", gspo: "GSPO" };
const named = (settings) => NAMES[settings.algorithm] ?? settings.algorithm;

/** Whether the algorithm compares the actions taken in one state. */
export const comparesSteps = (settings) => !settings || settings.algorithm === "gigpo" || settings.algorithm === "hgpo";

/** The idea in three sentences. */
export const idea = () =>
  h(
    "div",
    { class: "prose" },
    h("p", null, "GiGPO learns by comparing an agent with itself. It plays the same task several times: a ", h("strong", null, "group"), ". Episodes that did better than the group's average are encouraged as a whole, the others discouraged."),
    h("p", null, "Episodes of a group often come to the very same situation again: an ", h("strong", null, "anchor state"), ". There the actions can be compared one by one: of all that was tried in this state, which led to more? That is the second level, a group within the group, and it needs no extra play and no learned critic."),
  );

/** What the group's algorithm makes of the episodes' scores. */
function episodeLevel(settings) {
  const A = v("A", "E");
  const score = v("score");
  const over = [" = (", score, " − ", v("mean"), ") / ", v("F")];
  if (!settings) return [formula([A, over], "over the group's episodes")];
  const counted = settings.episode_statistics === "steps" ? "the steps of all episodes, so long ones count more" : "the episodes";
  const penalty = settings.invalid_action_penalty ? `; an invalid action costs its own step ${settings.invalid_action_penalty}` : "";
  const every = `Every step of an episode gets its advantage${penalty}.`;
  const note = (text) => h("p", { class: "small muted" }, text);
  switch (settings.algorithm) {
    case "hgpo":
      return [formula([A, " = 0"], "HGPO compares steps alone"), note("An episode's score counts through what each of its steps led to.")];
    case "rloo":
      return [formula([A, " = ", score, " − ", v("mean"), " of the others"], "over the group's other episodes"), note(`The mean is taken over ${counted}. ${every}`)];
    case "reinforce_pp":
      return [
        formula([A, " = (", v("b"), " − ", v("mean"), ") / ", v("F")], "over all groups of the update"),
        note(`b is the score${settings.group_baseline ? " less the mean of its group" : ""}; the mean is taken over ${counted}; F is ${scale(settings)}. ${every}`),
      ];
    default:
      return [formula([A, over], "over the group's episodes"), note(`The mean is taken over ${counted}; F is ${scale(settings)}. ${every}`)];
  }
}

/** Level one: the episodes of the group and their advantages. */
export function episodes(group, member, choose) {
  const columns = [
    { title: "Episode", cell: (row) => h("button", { type: "button", class: "quiet", "aria-pressed": row.member === member ? "true" : "false", onclick: () => choose(row.member === member ? null : row.member) }, row.member === member ? `◉ ${row.member + 1}` : `○ ${row.member + 1}`) },
    { title: "Outcome", cell: (row) => outcome(row.won) },
    { title: "Steps", num: true, cell: (row) => row.steps },
    { title: "Score", num: true, cell: (row) => row.reward.toFixed(1) },
    { title: level("E"), num: true, cell: (row) => advantage(row.episode_advantage) },
    { title: "", cell: (row) => h("a", { href: location.hash.replace(/explorer.*/, `trajectories/${row.group}/${row.member}`) }, "read") },
  ];
  return h(
    "section",
    { class: "card stack tight" },
    h("h2", null, "1 · The episodes against each other"),
    episodeLevel(group.formula),
    table("Episodes of the group", columns, group.trajectories, { rowClass: (row) => row.member === member && "chosen" }),
    h("p", { class: "small muted" }, "Choose an episode to see its path in the graph."),
  );
}

/** Level two, in general: what the group's algorithm makes of the steps, and of both levels together. */
export function returns(settings) {
  const total = (parts, why) => formula([v("A"), " = ", parts], `what the policy is trained with${why ? `; ${why}` : ""}`);
  if (!comparesSteps(settings)) {
    return [
      h("p", { class: "notice" }, `This run was trained with ${named(settings)}, which does not compare the actions within a state: each step has the advantage of its episode. The graph shows what GiGPO would have compared, coloured by the episodes' advantages.`),
      total(v("A", "E"), "no step level"),
    ];
  }
  const level = [
    formula([v("R", "t"), " = ", v("r", "t"), " + γ ", v("R", "t+1")], settings ? `what a step led to; γ = ${settings.gamma}, so sooner is worth more` : "what a step led to; sooner is worth more"),
  ];
  if (settings?.algorithm === "hgpo") {
    return [
      level,
      formula([v("A", "S"), " = Σ ", v("w", "k"), " ", v("A", "k"), " / Σ ", v("w", "k")], "k = 0, 1, …: over the steps taken in the same state after the same k states"),
      formula([v("A", "k"), " = (", v("R", "t"), " − ", v("mean"), ") / ", v("F")], "longer common histories weigh more; 0 for a lone step"),
      total(v("A", "S"), "no episode level"),
    ];
  }
  return [
    level,
    formula([v("A", "S"), " = (", v("R", "t"), " − ", v("mean"), ") / ", v("F")], "over the steps taken in the same state; 0 for a lone step"),
    total([v("A", "E"), " + ω ", v("A", "S")], settings ? `ω = ${settings.omega}` : null),
  ];
}

/** The formula with the numbers of the step of a state that stands out most. */
export function worked(state, settings) {
  if (!settings || settings.algorithm !== "gigpo") return null;
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
