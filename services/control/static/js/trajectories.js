// The page "Trajectories": find an episode and read it.

import { h, show } from "./dom.js";
import { fixed, length, signed, versions, words } from "./format.js";
import { advantageLine, level, nothingKept, outcome, select } from "./parts.js";

const PAGE = 60;

function pick(shared, item) {
  return h(
    "a",
    { class: "pick", href: `#/${shared.name}/trajectories/${item.group}/${item.member}` },
    h("span", { class: "row between" }, h("span", null, words(item.task_type)), outcome(item.won)),
    h(
      "span",
      { class: "row small muted" },
      `group ${item.group}, episode ${item.member + 1} · ${length(item)} · ${versions(item)}`,
    ),
    h("span", { class: "row between small muted" }, `update ${item.update}`, h("span", null, level("E"), ` ${signed(item.episode_advantage)}`)),
  );
}

/** Which call of which turn a step is, where some turn of the episode took several calls or a call was not trained on. */
function place(steps, step) {
  if (step.turn === null) return "not trained on";
  const calls = steps.filter((other) => other.turn === step.turn);
  return steps.every((other) => other.turn === other.number) ? null : `turn ${step.turn + 1}, call ${calls.indexOf(step) + 1} of ${calls.length}`;
}

/** The advantages of a step, and where it stood. */
function credit(shared, group, step, most) {
  if (step.turn === null) return h("div", { class: "adv" }, h("p", { class: "small muted" }, "no advantage"));
  return h(
    "div",
    { class: "adv", role: "group", "aria-label": `Advantages of step ${step.number + 1}` },
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

function stepView(shared, group, step, steps, most) {
  const spans = step.versions.map((span) => `v${span.version}`).join(", ");
  const called = place(steps, step);
  const tags = [
    called && h("span", { class: "badge" }, called),
    step.extends !== null && h("span", { class: "badge" }, `continues step ${step.extends + 1}`),
    !step.valid && h("span", { class: "badge bad" }, "invalid action"),
    step.reward !== 0 && h("span", { class: "badge good" }, `reward ${step.reward}`),
    step.truncated && h("span", { class: "badge" }, "step limit"),
  ];
  return h(
    "li",
    { class: step.valid ? "step" : "step invalid" },
    h("span", { class: "index" }, h("span", { class: "hidden" }, "Step "), step.number + 1),
    h(
      "div",
      { class: "stack tight" },
      h("p", { class: "said observation" }, step.observation),
      step.thought && h("p", { class: "said thought" }, h("span", { class: "hidden" }, "Thought: "), step.thought),
      h("p", { class: "said action" }, h("span", { class: "hidden" }, "Action: "), step.action),
      h("div", { class: "row" }, tags),
      h(
        "details",
        null,
        h("summary", null, `Prompt and response · ${step.prompt_tokens} + ${step.response_tokens} tokens · ${spans}`),
        h("div", { class: "stack tight" }, h("h3", null, "Prompt"), h("pre", { tabindex: "0" }, step.prompt || "(not kept)"), h("h3", null, "Response"), h("pre", { tabindex: "0" }, step.response)),
      ),
    ),
    credit(shared, group, step, most),
  );
}

function episode(shared, view) {
  const { summary, facts, steps } = view;
  const most = Math.max(...steps.flatMap((step) => [step.episode_advantage, step.step_advantage, step.advantage].map(Math.abs)));
  const told = ["goal", "score"].filter((name) => facts[name] !== undefined).map((name) => [name, String(facts[name])]);
  const list = [
    ["task", `${summary.task.env}, ${summary.task.split} ${summary.task.index}`],
    ...told,
    ["reward", String(summary.reward)],
    [summary.turns === summary.steps ? "steps" : "length", summary.turns === summary.steps ? `${summary.steps}, ${summary.valid_steps} valid` : `${length(summary)}, ${summary.valid_steps} calls valid`],
    ["policy", versions(summary)],
    ["trained in", `update ${summary.update}`],
    ["played by", `${summary.actor}, ${(view.finished_at - view.started_at).toFixed(1)} s`],
  ];
  return [
    h("a", { class: "narrow-only", href: `#/${shared.name}/trajectories` }, "← All episodes"),
    h("header", { class: "row between" }, h("h2", null, words(summary.task_type)), h("span", { class: "row" }, outcome(summary.won), h("a", { href: `#/${shared.name}/explorer/${summary.group}` }, `See group ${summary.group}`))),
    h("dl", { class: "row small" }, list.map(([name, value]) => h("div", null, h("dt", { class: "muted" }, name), h("dd", null, value)))),
    h("ol", { "aria-label": "Steps" }, steps.map((step) => stepView(shared, summary.group, step, steps, most))),
  ];
}

/** The filters of the list. They are kept as long as the run stays the same. */
let filters = { run: null };

function filtersOf(run) {
  if (filters.run !== run) filters = { run, asked: { task_type: "", won: "", version: "" } };
  return filters.asked;
}

export async function render(main, shared, rest, visit) {
  const path = `/runs/${encodeURIComponent(shared.name)}/trajectories`;
  const asked = filtersOf(shared.name);
  const side = h("section", { class: "card stack list-side", "aria-label": "Episodes" });
  const detail = h("article", { class: "card stack", "aria-label": "Episode", tabindex: "-1" });
  const frame = h("div", { class: "split" }, side, detail);
  const list = h("div");
  const results = h("div", { class: "list-pane" });
  const count = h("p", { class: "small muted", role: "status" });
  const more = h("button", { type: "button", hidden: true }, "Show more");
  let chosen = "";
  let found = [];
  let loads = 0;
  let choices = 0;

  const mark = () => {
    for (const link of list.querySelectorAll(".pick")) {
      if (link.hash === chosen) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };

  async function load(offset) {
    const turn = (loads += 1);
    const answer = await visit.get(path, { ...asked, offset, limit: PAGE });
    if (turn !== loads) return answer;
    found = offset ? [...found, ...answer.trajectories] : answer.trajectories;
    count.textContent = `${answer.total} episodes${answer.first_update === null ? "" : `, of updates ${answer.first_update} to ${answer.last_update}`}`;
    more.hidden = found.length >= answer.total;
    const picks = answer.trajectories.map((item) => pick(shared, item));
    if (offset) list.append(...picks);
    else show(list, picks.length ? picks : h("p", { class: "muted" }, "No matching episode."));
    mark();
    return answer;
  }
  const filter = (name) => (value) => ((asked[name] = value), visit.attempt(load(0)));

  /** Show the episode of the address or, if it names none, the first one. The list is unchanged. */
  async function choose([group, member], isMove) {
    const turn = (choices += 1);
    const isNamed = group !== undefined;
    const last = chosen;
    chosen = isNamed ? `#/${shared.name}/trajectories/${group}/${member}` : "";
    frame.classList.toggle("has-detail", isNamed);
    mark();
    if (isMove && !isNamed) list.querySelector(`.pick[href="${CSS.escape(last)}"]`)?.focus();
    const [g, m] = isNamed ? [group, member] : [found[0]?.group, found[0]?.member];
    if (g === undefined) return show(detail, h("p", { class: "muted" }, "Choose an episode."));
    const shown = await visit.get(`${path}/${Number(g)}/${Number(m)}`).then(
      (view) => episode(shared, view),
      (error) => {
        if (visit.ended() || error.status === 401) throw error;
        return h("p", { class: "error", role: "alert" }, error.message);
      },
    );
    if (turn !== choices) return undefined;
    show(detail, shown);
    if (isMove && isNamed && side.offsetParent === null) {
      detail.focus({ preventScroll: true }); // on a narrow screen the episode replaces the list
      scrollTo(0, 0);
    }
    return undefined;
  }

  const answer = await load(0);
  if (answer.first_update === null) return show(main, h("h1", null, "Trajectories"), nothingKept());
  more.addEventListener("click", () => visit.attempt(load(found.length)));
  const version = h("input", { type: "number", min: "0", inputmode: "numeric", value: asked.version, onchange: (event) => filter("version")(event.target.value) });
  show(results, list, more);
  show(
    side,
    h(
      "div",
      { class: "row", role: "search", "aria-label": "Filter episodes" },
      select("Task type", [["", "all"], ...answer.task_types.map((type) => [type, words(type)])], asked.task_type, filter("task_type")),
      select("Outcome", [["", "all"], ["true", "won"], ["false", "lost"]], asked.won, filter("won")),
      h("label", { class: "field" }, "Policy version", version),
    ),
    count,
    results,
  );
  show(main, h("h1", null, "Trajectories"), frame);
  visit.follow = (other) => choose(other, true);
  return choose(rest, false);
}
