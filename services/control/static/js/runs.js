// The page "Runs": the list of all runs.

import { h, show, table } from "./dom.js";
import { clock, percent } from "./format.js";

export async function render(main, shared, rest, visit) {
  const { runs } = await visit.get("/runs");
  const columns = [
    { title: "Run", cell: (run) => h("a", { href: `#/${run.name}/run` }, run.name) },
    { title: "State", cell: (run) => h("span", { class: run.live ? "badge good dot" : "badge dot", title: run.note }, run.live ? run.state : "ended") },
    { title: "Algorithm", cell: (run) => run.algorithm ?? "–" },
    { title: "Environment", cell: (run) => run.env ?? "–" },
    { title: "Updates", num: true, cell: (run) => `${run.update} of ${run.updates ?? "?"}` },
    { title: "Success", num: true, cell: (run) => percent(run.success) },
    { title: "Evaluation", num: true, cell: (run) => percent(run.evaluation) },
    { title: "Newest record", cell: (run) => clock(run.changed_at) },
  ];
  const body = runs.length ? table("Runs", columns, runs) : h("p", { class: "muted" }, "No runs in this folder yet.");
  show(main, h("section", { class: "card stack" }, h("h1", null, "Runs"), body));
}
