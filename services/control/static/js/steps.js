// The steps of an episode: one after the other or, where an agent program played it, a tree of turns, calls, tool calls.

import { h } from "./dom.js";
import { fixed } from "./format.js";
import { advantageLine, level } from "./parts.js";

const THOUGHT = /<think>.*?(<\/think>|$)/gs;

/** Whether an agent program played the episode, or some turn of it took several calls. */
const isTree = ({ facts, steps }) => facts.agent?.cause !== undefined || steps.some((step) => step.turn !== step.number);

/** The advantages of a turn, and where it stood. `step` is its first call. */
function credit(shared, group, step, most, name) {
  if (step.turn === null) return h("div", { class: "adv" }, h("p", { class: "small muted" }, "no advantage"));
  return h(
    "div",
    { class: "adv", role: "group", "aria-label": `Advantages of ${name}` },
    advantageLine("E", "episode level: this episode compared with its group", step.episode_advantage, most),
    advantageLine("S", "step level: this step compared with the others taken in the same state", step.step_advantage, most),
    advantageLine(null, "the advantage that the policy was trained with", step.advantage, most),
    h(
      "p",
      { class: "small muted" },
      `return ${fixed(step.return)}`,
      h("br"),
      h("a", { href: `#/${shared.name}/explorer/${group}/${step.state}` }, `state ${step.state}`),
      step.step_group_size > 1 ? `, ${step.step_group_size} steps there` : ", the only step there",
    ),
  );
}

const thought = (step) => step.thought && h("p", { class: "said thought" }, h("span", { class: "hidden" }, "Thought: "), step.thought);
const action = (text) => h("p", { class: "said action" }, h("span", { class: "hidden" }, "Action: "), text);

/** What became of a step, or of a turn. */
const outcomes = ({ valid, reward, truncated }) => [
  !valid && h("span", { class: "badge bad" }, "invalid action"),
  reward !== 0 && h("span", { class: "badge good" }, `reward ${reward}`),
  truncated && h("span", { class: "badge" }, "step limit"),
];

function reading(step) {
  const spans = step.versions.map((span) => `v${span.version}`).join(", ");
  return h(
    "details",
    null,
    h("summary", null, `Prompt and response · ${step.prompt_tokens} + ${step.response_tokens} tokens · ${spans}`),
    h("div", { class: "stack tight" }, h("h3", null, "Prompt"), h("pre", { tabindex: "0" }, step.prompt || "(not kept)"), h("h3", null, "Response"), h("pre", { tabindex: "0" }, step.response)),
  );
}

function stepView(shared, group, step, most) {
  return h(
    "li",
    { class: step.valid ? "step" : "step invalid" },
    h("span", { class: "index" }, h("span", { class: "hidden" }, "Step "), step.number + 1),
    h("div", { class: "stack tight" }, h("p", { class: "said observation" }, step.observation), thought(step), action(step.action), h("div", { class: "row" }, outcomes(step)), reading(step)),
    credit(shared, group, step, most, `step ${step.number + 1}`),
  );
}

/** The steps by turn, in their order. A call that was not trained on is listed with the turn before it, else with the first. */
function turnsOf(steps) {
  const turns = [];
  let early = [];
  for (const step of steps) {
    const last = turns.at(-1);
    if (step.turn !== null && step.turn !== last?.number) turns.push({ number: step.turn, calls: [...early.splice(0), step] });
    else (last?.calls ?? early).push(step);
  }
  if (early.length) turns.push({ number: null, calls: early });
  return turns;
}

/** The response without its thought. */
const spoken = (step) => step.response.replaceAll(THOUGHT, "").trim();

function callView(step) {
  const tools = step.tool_calls.map((call) => h("li", { class: "mono" }, h("b", null, call.name), " ", h("span", { class: "said" }, call.arguments)));
  const tags = [
    step.turn === null && h("span", { class: "badge" }, "not trained on"),
    step.extends !== null && h("span", { class: "badge" }, `continues call ${step.extends + 1}`),
    step.turn !== null && !step.valid && h("span", { class: "badge bad" }, "invalid"),
  ];
  return h(
    "li",
    { class: "call stack tight" },
    h("div", { class: "row small" }, h("span", { class: "muted" }, `Call ${step.number + 1}`), tags),
    thought(step),
    tools.length ? h("ul", { class: "tool-calls", "aria-label": `Tool calls of call ${step.number + 1}` }, tools) : h("p", { class: "said" }, spoken(step)),
    reading(step),
  );
}

function turnView(shared, group, turn, most) {
  const own = turn.calls.filter((step) => step.turn !== null);
  const [first, last] = [own[0] ?? turn.calls[0], own.at(-1) ?? turn.calls.at(-1)];
  const valid = own.every((step) => step.valid);
  const name = turn.number === null ? "no turn" : `turn ${turn.number + 1}`;
  const said = last.tool_calls.length ? JSON.stringify(last.tool_calls) : spoken(last);
  const sum = { valid, truncated: last.truncated, reward: turn.calls.reduce((all, step) => all + step.reward, 0) };
  return h(
    "li",
    { class: valid ? "step" : "step invalid" },
    h("span", { class: "index" }, h("span", { class: "hidden" }, "Turn "), turn.number === null ? "–" : turn.number + 1),
    h(
      "div",
      { class: "stack tight" },
      h("p", { class: "said observation" }, first.observation),
      h("ol", { class: "calls", "aria-label": `Calls of ${name}` }, turn.calls.map(callView)),
      last.action !== said && action(last.action), // the call itself is shown already
      h("div", { class: "row" }, outcomes(sum)),
    ),
    credit(shared, group, first, most, name),
  );
}

/** The list of an episode's steps, or of its turns. */
export function stepList(shared, view) {
  const { steps, summary } = view;
  const most = Math.max(...steps.flatMap((step) => [step.episode_advantage, step.step_advantage, step.advantage].map(Math.abs)));
  if (isTree(view)) return h("ol", { "aria-label": "Turns" }, turnsOf(steps).map((turn) => turnView(shared, summary.group, turn, most)));
  return h("ol", { "aria-label": "Steps" }, steps.map((step) => stepView(shared, summary.group, step, most)));
}
