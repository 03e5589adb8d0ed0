// The page "Trajectories": find an episode and read it.

import { h, show } from "./dom.js";
import { length, signed, versions, words } from "./format.js";
import { level, nothingKept, outcome, select } from "./parts.js";
import { stepList } from "./steps.js";

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

/** How an agent's episode ended, and what the gateway counted. */
function agentEnd({ cause, calls, exit, refused, orphaned }) {
  const counts = [[refused, "refused"], [orphaned, "not received"]].filter(([count]) => count > 0).map(([count, name]) => `, ${count} ${name}`);
  return `${words(cause)}${exit ? ` (exit code ${exit})` : ""}, ${calls} calls${counts.join("")}`;
}

function episode(shared, view) {
  const { summary, facts } = view;
  const told = ["goal", "score"].filter((name) => facts[name] !== undefined).map((name) => [name, String(facts[name])]);
  const list = [
    ["task", `${summary.task.env}, ${summary.task.split} ${summary.task.index}`],
    ...told,
    ["reward", String(summary.reward)],
    [summary.turns === summary.steps ? "steps" : "length", summary.turns === summary.steps ? `${summary.steps}, ${summary.valid_steps} valid` : `${length(summary)}, ${summary.valid_steps} calls valid`],
    ["policy", versions(summary)],
    ["trained in", `update ${summary.update}`],
    ["played by", `${summary.actor}, ${(view.finished_at - view.started_at).toFixed(1)} s`],
    ...(facts.agent?.cause === undefined ? [] : [["agent", agentEnd(facts.agent)]]),
  ];
  return [
    h("a", { class: "narrow-only", href: `#/${shared.name}/trajectories` }, "← All episodes"),
    h("header", { class: "row between" }, h("h2", null, words(summary.task_type)), h("span", { class: "row" }, outcome(summary.won), h("a", { href: `#/${shared.name}/explorer/${summary.group}` }, `See group ${summary.group}`))),
    h("dl", { class: "row small" }, list.map(([name, value]) => h("div", null, h("dt", { class: "muted" }, name), h("dd", null, value)))),
    stepList(shared, view),
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
