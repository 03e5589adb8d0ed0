// Actors and buffer: who does what on which version, what waits where, and the buttons for what the API can do.

import { post } from "./api.js";
import { confirm, h, show, table } from "./dom.js";
import { ago, bytes, clock, percent, seconds, short } from "./format.js";

const LOOK_MS = 5000;

const ACTIONS = [
  ["pause", "Pause", "Tickets that are out are played to their end, then everything rests. The run keeps its memory and its machines.", {}],
  ["resume", "Resume", "Go on where the run was paused.", {}],
  ["checkpoint", "Checkpoint now", "Write a checkpoint between two updates; the groups it records then leave Redis.", {}],
  ["evaluate", "Evaluate now", "Play the evaluation panel with the current policy; the learner waits meanwhile.", {}],
  ["scale", "Scale …", "Say how many rollout actors are wanted; the pool follows as far as the cluster has room.", {}],
  ["stop", "Stop", "End the run after the work in hand, with a checkpoint. It can be resumed from the command line.", { danger: true }],
];

async function act(shared, [action, title, text, options], said) {
  const body = { action };
  let extra = null;
  if (action === "scale") {
    const input = h("input", { type: "number", min: "0", max: "10000", value: shared.facts.actors?.wanted ?? shared.facts.actors?.actors.length ?? 1 });
    extra = h("label", { class: "field" }, "Rollout actors", input);
    Object.defineProperty(body, "actors", { get: () => Number(input.value), enumerable: true });
  }
  if (!(await confirm(`${title.replace(" …", "")}: ${shared.name}?`, text, title.replace(" …", ""), { ...options, extra }))) return;
  try {
    await post(`/runs/${encodeURIComponent(shared.name)}/actions`, body);
    said.textContent = `${title.replace(" …", "")} was asked for. Its answer appears below.`;
  } catch (error) {
    said.textContent = error.message;
  }
}

function buttons(shared, said) {
  const { run } = shared.facts;
  const why = shared.me?.role !== "admin" ? "The read token may look, not act." : !run?.live ? "The run is not live." : null;
  const off = (action) => why !== null || (action === "pause" && run.state === "paused") || (action === "resume" && run.state !== "paused");
  return [
    why && h("p", { class: "notice" }, why),
    h(
      "ul",
      { class: "actions" },
      ACTIONS.map((entry) => {
        const [action, title, text, { danger }] = entry;
        const button = h("button", { type: "button", class: danger && "danger", disabled: off(action), onclick: () => act(shared, entry, said) }, title);
        return h("li", null, button, h("span", { class: "small muted" }, text));
      }),
    ),
  ];
}

function bufferView(buffer) {
  if (!buffer?.live) return h("p", { class: "muted" }, "The run is not live: tickets and groups are in its Redis, which does not answer.");
  const filled = buffer.cap_bytes ? buffer.trajectory_bytes / buffer.cap_bytes : 0;
  const meter = h("span");
  meter.style.setProperty("width", `${Math.min(100, 100 * filled)}%`);
  const tiles = [
    ["Tickets queued", buffer.queued, "wait for an actor"],
    ["Tickets leased", buffer.leased, "are being played"],
    ["Groups complete", buffer.complete_groups.length, "wait to be used or acknowledged"],
    ["Groups cancelled", Object.keys(buffer.cancelled_groups).length, "could not be played"],
  ];
  const columns = [
    { title: "Stream", cell: (row) => row.stream },
    { title: "Open", num: true, cell: (row) => row.open },
    { title: "Complete", num: true, cell: (row) => row.complete },
    { title: "Cancelled", num: true, cell: (row) => row.cancelled },
  ];
  return [
    h("dl", { class: "tiles" }, tiles.map(([name, value, more]) => h("div", { class: "tile" }, h("dt", null, name), h("dd", null, value), h("dd", { class: "small" }, more)))),
    h("div", { class: "stack tight" }, h("p", { class: "small" }, `Trajectories: ${bytes(buffer.trajectory_bytes)} of ${bytes(buffer.cap_bytes)}${buffer.full ? ": full, no new group is begun" : ""}`), h("div", { class: "meter", role: "img", "aria-label": `${percent(filled, 0)} full` }, meter)),
    table("Groups by stream", columns, buffer.streams),
    buffer.complete_groups.length > 0 && h("p", { class: "small muted" }, `Complete: ${buffer.complete_groups.slice(0, 60).join(", ")}${buffer.complete_groups.length > 60 ? " …" : ""}`),
    Object.keys(buffer.cancelled_groups).length > 0 && h("ul", { class: "small" }, Object.entries(buffer.cancelled_groups).map(([group, reason]) => h("li", null, `Group ${group}: ${reason}`))),
  ];
}

function actorsView(actors, run) {
  if (!actors?.live) return h("p", { class: "muted" }, "No actor is heard of: the run is not live.");
  if (!actors.actors.length) return h("p", { class: "muted" }, `No actor was heard of in the last ${actors.heartbeat_s} s.`);
  const behind = (row) => (run && row.version !== null && run.update > row.version ? ` (${run.update - row.version} behind)` : "");
  const columns = [
    { title: "Actor", cell: (row) => row.name },
    { title: "State", cell: (row) => row.state },
    { title: "Policy", cell: (row) => (row.version === null ? "–" : `v${row.version}${behind(row)}`) },
    { title: "Episodes", num: true, cell: (row) => row.episodes ?? "–" },
    { title: "Tokens/s", num: true, cell: (row) => short(row.tokens_per_s) },
    { title: "KV cache", num: true, cell: (row) => percent(row.kv_use, 0) },
    { title: "Stored", num: true, cell: (row) => row.stored ?? "–" },
    { title: "Failed", num: true, cell: (row) => row.failed ?? "–" },
    { title: "Abandoned", num: true, cell: (row) => row.abandoned ?? "–" },
    { title: "Heard", cell: (row) => h("span", { "data-heard": row.heard_s }, ago(row.heard_s)) },
    { title: "Host", cell: (row) => row.host },
  ];
  const wanted = actors.wanted === null ? null : h("p", { class: "small muted" }, `${actors.wanted} wanted.`);
  return [table("Rollout actors", columns, actors.actors), wanted];
}

function leasesView(leases) {
  if (!leases.length) return h("p", { class: "muted" }, "No ticket is leased.");
  const holders = [...Map.groupBy(leases, (lease) => lease.holder).entries()].map(([holder, list]) => ({ holder, list }));
  const left = (list) => Math.min(...list.map((lease) => lease.left_s));
  const columns = [
    { title: "Holder", cell: (row) => row.holder },
    { title: "Tickets", num: true, cell: (row) => row.list.length },
    { title: "Groups", cell: (row) => [...new Set(row.list.map((lease) => `${lease.stream} ${lease.group}`))].join(", ") },
    { title: "First ends in", num: true, cell: (row) => (left(row.list) > 0 ? seconds(left(row.list)) : "now") },
    { title: "Failed before", num: true, cell: (row) => row.list.filter((lease) => lease.attempts > 0).length },
  ];
  return [
    h("p", { class: "small muted" }, "A lease is renewed while its episode is played; one that ends hands its ticket to another actor."),
    table("Leases by holder", columns, holders),
  ];
}

function commandsView(commands) {
  const columns = [
    { title: "Asked for", cell: (row) => (row.actors === null ? row.action : `${row.action} to ${row.actors}`) },
    { title: "By", cell: (row) => row.by },
    { title: "When", cell: (row) => clock(row.at) },
    { title: "Answer", cell: (row) => (row.answer ? row.answer.text : "waiting") },
  ];
  return commands?.length ? table("Commands", columns, commands.slice(0, 20)) : h("p", { class: "muted" }, "Nothing was asked of this run since its Redis began.");
}

function auditView(audit) {
  const lines = [
    { title: "When", cell: (row) => clock(row.at) },
    { title: "By", cell: (row) => row.by },
    { title: "Action", cell: (row) => (row.actors === null ? row.action : `${row.action} to ${row.actors}`) },
    { title: "Result", cell: (row) => row.result },
  ];
  return audit.length ? table(`Audit log, the newest ${audit.length} lines`, lines, audit.toReversed()) : h("p", { class: "muted" }, "Empty.");
}

function serversView(environments, live) {
  if (!environments.length) return h("p", { class: "muted" }, live ? "None is known." : "None is asked: the run is not live.");
  const columns = [
    { title: "Address", cell: (row) => row.url },
    { title: "Environment", cell: (row) => row.name ?? "–" },
    { title: "State", cell: (row) => h("span", { class: row.reachable ? "badge good" : "badge bad" }, row.detail) },
    { title: "Sessions", num: true, cell: (row) => short(row.sessions) },
    { title: "Actions taken", num: true, cell: (row) => short(row.steps) },
    { title: "Faults", num: true, cell: (row) => short(row.faults) },
  ];
  return table("Environment servers", columns, environments);
}

export async function render(main, shared, rest, visit) {
  const path = `/runs/${encodeURIComponent(shared.name)}`;
  const names = ["buttons", "buffer", "leases", "actors", "servers", "commands", "audit"];
  const places = Object.fromEntries(names.map((name) => [name, h("div", { class: "stack" })]));
  const said = h("p", { role: "status", class: "small" });
  const card = (title, ...body) => h("section", { class: "card stack" }, h("h2", null, title), body);
  show(
    main,
    h("h1", null, "Actors and buffer"),
    card("Rollout actors", places.actors),
    card("Buffer", places.buffer),
    card("Leases", places.leases),
    card("Environment servers", places.servers),
    card("What the run can be asked to do", places.buttons, said),
    card("Commands", places.commands, h("details", null, h("summary", null, "Audit log"), places.audit)),
  );
  let pressed = "";
  const { facts } = shared;
  const draw = {
    buffer: () => show(places.buffer, bufferView(facts.buffer)),
    actors: () => show(places.actors, actorsView(facts.actors, facts.run)),
    commands: () => show(places.commands, commandsView(facts.commands?.commands)),
    run() {
      draw.actors();
      const state = `${facts.run?.state} ${facts.run?.live} ${shared.me?.role}`;
      if (state !== pressed) show(places.buttons, buttons(shared, said)); // keeps the focus on a button
      pressed = state;
    },
  };
  const grow = () => {
    const since = (Date.now() - facts.actorsAt) / 1000;
    for (const cell of places.actors.querySelectorAll("[data-heard]")) cell.textContent = ago(Number(cell.dataset.heard) + since);
  };
  const look = async () => {
    const [servers, log, { leases }] = await Promise.all([
      visit.get(`${path}/environments`),
      visit.get(`${path}/audit`, { limit: 50 }),
      visit.get(`${path}/leases`).catch(whenItLeaves),
    ]);
    show(places.leases, leasesView(leases));
    show(places.servers, serversView(servers.environments, facts.run?.live));
    show(places.audit, auditView(log.entries));
  };
  visit.listen((event) => draw[event]?.());
  visit.every(LOOK_MS, () => look().catch(() => {})); // the line beside the run's name says that nobody answers
  visit.every(1000, grow);
  Object.values(draw).forEach((part) => part());
  await look();
}

/** Between two looks the run may have gone: it leases nothing. */
function whenItLeaves(error) {
  if (error.status === 409) return { leases: [] };
  throw error;
}
