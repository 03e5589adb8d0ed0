// The page "Actors and buffer": the actors and their versions, what waits in the buffer, and buttons for the actions.

import { post } from "./api.js";
import { confirm, h, show, table } from "./dom.js";
import { ago, bytes, clock, percent, seconds, short } from "./format.js";

const REFRESH_MS = 5000;

const ACTIONS = [
  ["pause", "Pause", "Finish the issued tickets, then wait. The run keeps its memory and its machines.", {}],
  ["resume", "Resume", "Continue where the run was paused.", {}],
  ["checkpoint", "Checkpoint now", "Write a checkpoint between two updates. The groups that it records are then deleted from Redis.", {}],
  ["evaluate", "Evaluate now", "Play the evaluation panel with the current policy. The learner waits meanwhile.", {}],
  ["scale", "Scale …", "Set the number of rollout actors. The pool follows as far as the cluster has resources.", {}],
  ["stop", "Stop", "Finish the current update, write a checkpoint and end the run. It can be resumed from the command line.", { danger: true }],
];

async function act(shared, [action, title, text, options], status) {
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
    status.textContent = `${title.replace(" …", "")} was requested. Its result appears below.`;
  } catch (error) {
    status.textContent = error.message;
  }
}

function buttons(shared, status) {
  const { run } = shared.facts;
  const why = shared.me?.role !== "admin" ? "The read token does not allow actions." : !run?.live ? "The run is not live." : null;
  const off = (action) => why !== null || (action === "pause" && run.state === "paused") || (action === "resume" && run.state !== "paused");
  return [
    why && h("p", { class: "notice" }, why),
    h(
      "ul",
      { class: "actions" },
      ACTIONS.map((entry) => {
        const [action, title, text, { danger }] = entry;
        const button = h("button", { type: "button", class: danger && "danger", disabled: off(action), onclick: () => act(shared, entry, status) }, title);
        return h("li", null, button, h("span", { class: "small muted" }, text));
      }),
    ),
  ];
}

function bufferView(buffer) {
  if (!buffer?.live) return h("p", { class: "muted" }, "The run is not live: tickets and groups are in its Redis, which does not respond.");
  const filled = buffer.cap_bytes ? buffer.trajectory_bytes / buffer.cap_bytes : 0;
  const meter = h("span");
  meter.style.setProperty("width", `${Math.min(100, 100 * filled)}%`);
  const training = buffer.streams.find((row) => row.stream === "train") ?? { complete: 0, cancelled: 0 };
  const listed = { complete: buffer.complete_groups.slice(0, 60), cancelled: Object.entries(buffer.cancelled_groups) };
  const tiles = [
    ["Tickets queued", buffer.queued, "waiting for an actor"],
    ["Tickets leased", buffer.leased, "being played"],
    ["Groups complete", training.complete, "waiting to be used or acknowledged"],
    ["Groups cancelled", training.cancelled, "could not be played"],
  ];
  const columns = [
    { title: "Stream", cell: (row) => row.stream },
    { title: "Open", num: true, cell: (row) => row.open },
    { title: "Complete", num: true, cell: (row) => row.complete },
    { title: "Cancelled", num: true, cell: (row) => row.cancelled },
  ];
  return [
    h("dl", { class: "tiles" }, tiles.map(([name, value, more]) => h("div", { class: "tile" }, h("dt", null, name), h("dd", null, value), h("dd", { class: "small" }, more)))),
    h("div", { class: "stack tight" }, h("p", { class: "small" }, `Trajectories: ${bytes(buffer.trajectory_bytes)} of ${bytes(buffer.cap_bytes)}${buffer.full ? "; full: no new group starts" : ""}`), h("div", { class: "meter", role: "img", "aria-label": `${percent(filled, 0)} full` }, meter)),
    table("Groups by stream", columns, buffer.streams),
    listed.complete.length > 0 && h("p", { class: "small muted" }, `Complete: ${listed.complete.join(", ")}${training.complete > listed.complete.length ? " …" : ""}`),
    listed.cancelled.length > 0 && h("ul", { class: "small" }, listed.cancelled.map(([group, reason]) => h("li", null, `Group ${group}: ${reason}`)), training.cancelled > listed.cancelled.length && h("li", null, `and ${training.cancelled - listed.cancelled.length} more`)),
  ];
}

function actorsView(actors, run) {
  if (!actors?.live) return h("p", { class: "muted" }, "The run is not live, so it has no actors.");
  if (!actors.actors.length) return h("p", { class: "muted" }, `No heartbeat of an actor in the last ${actors.heartbeat_s} s.`);
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
    { title: "Heartbeat", cell: (row) => h("span", { "data-heard": row.heard_s }, ago(row.heard_s)) },
    { title: "Host", cell: (row) => row.host },
  ];
  const agents = actors.actors.filter((row) => row.agents !== null);
  const wanted = actors.wanted === null ? "" : ` ${actors.wanted} requested.`;
  const part = actors.total > actors.actors.length ? ` The first ${actors.actors.length} by name are listed.` : "";
  const sums = `${actors.total} actors play ${actors.episodes} episodes at ${short(actors.tokens_per_s)} tokens/s.${wanted}${part}`;
  return [table("Rollout actors", columns, actors.actors), h("p", { class: "small muted" }, sums), agents.length > 0 && agentsView(agents)];
}

/** The agent programs of the actors, and what is known of the chat template, which is the same for all. */
function agentsView(actors) {
  const columns = [
    { title: "Actor", cell: (row) => row.name },
    { title: "Gateway", cell: (row) => row.agents.gateway ?? "not started" },
    { title: "Playing", num: true, cell: (row) => row.agents.playing },
    { title: "Processes", num: true, cell: (row) => row.agents.processes },
    { title: "Services waiting", num: true, cell: (row) => row.agents.waiting },
    { title: "Calls/s", num: true, cell: (row) => short(row.agents.calls_per_s) },
    { title: "Calls a turn", num: true, cell: (row) => short(row.agents.calls_per_turn) },
    { title: "Prompts continued", num: true, cell: (row) => percent(row.agents.extended_fraction) },
    { title: "Short anchors", num: true, cell: (row) => percent(row.agents.short_anchor_fraction) },
  ];
  const told = actors[0].agents.template;
  return [table("Agent programs", columns, actors), told.length > 0 && h("p", { class: "small muted" }, `Chat template: ${told.join("; ")}`)];
}

function leasesView({ leases, total }) {
  if (!leases.length) return h("p", { class: "muted" }, "No ticket is leased.");
  const holders = [...Map.groupBy(leases, (lease) => lease.holder).entries()].map(([holder, list]) => ({ holder, list }));
  const left = (list) => Math.min(...list.map((lease) => lease.left_s));
  const columns = [
    { title: "Holder", cell: (row) => row.holder },
    { title: "Tickets", num: true, cell: (row) => row.list.length },
    { title: "Groups", cell: (row) => [...new Set(row.list.map((lease) => `${lease.stream} ${lease.group}`))].join(", ") },
    { title: "First expires in", num: true, cell: (row) => (left(row.list) > 0 ? seconds(left(row.list)) : "now") },
    { title: "Earlier failures", num: true, cell: (row) => row.list.filter((lease) => lease.attempts > 0).length },
  ];
  return [
    h("p", { class: "small muted" }, "A lease is renewed while its episode is played. When it expires, another actor gets the ticket."),
    total > leases.length && h("p", { class: "small muted" }, `The ${leases.length} of ${total} leases that expire first are counted.`),
    table("Leases by holder", columns, holders),
  ];
}

function commandsView(commands) {
  const columns = [
    { title: "Action", cell: (row) => (row.actors === null ? row.action : `${row.action} to ${row.actors}`) },
    { title: "By", cell: (row) => row.by },
    { title: "When", cell: (row) => clock(row.at) },
    { title: "Result", cell: (row) => (row.answer ? row.answer.text : "waiting") },
  ];
  return commands?.length ? table("Commands", columns, commands.slice(0, 20)) : h("p", { class: "muted" }, "No action was requested since this run's Redis started.");
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
  if (!environments.length) return h("p", { class: "muted" }, live ? "None known." : "Not checked: the run is not live.");
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
  const status = h("p", { role: "status", class: "small" });
  const card = (title, ...body) => h("section", { class: "card stack" }, h("h2", null, title), body);
  show(
    main,
    h("h1", null, "Actors and buffer"),
    card("Rollout actors", places.actors),
    card("Buffer", places.buffer),
    card("Leases", places.leases),
    card("Environment servers", places.servers),
    card("Actions", places.buttons, status),
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
      if (state !== pressed) show(places.buttons, buttons(shared, status)); // otherwise a redraw would take the focus from a button
      pressed = state;
    },
  };
  const updateAges = () => {
    const since = (Date.now() - facts.actorsAt) / 1000;
    for (const cell of places.actors.querySelectorAll("[data-heard]")) cell.textContent = ago(Number(cell.dataset.heard) + since);
  };
  const refresh = async () => {
    const [servers, log, leases] = await Promise.all([
      visit.get(`${path}/environments`),
      visit.get(`${path}/audit`, { limit: 50 }),
      visit.get(`${path}/leases`).catch(noLeasesWhenEnded),
    ]);
    show(places.leases, leasesView(leases));
    show(places.servers, serversView(servers.environments, facts.run?.live));
    show(places.audit, auditView(log.entries));
  };
  visit.listen((event) => draw[event]?.());
  visit.every(REFRESH_MS, () => refresh().catch(() => {})); // the badge beside the run's name reports a lost connection
  visit.every(1000, updateAges);
  Object.values(draw).forEach((part) => part());
  await refresh();
}

/** The run may end between two refreshes: then it has no leases. */
function noLeasesWhenEnded(error) {
  if (error.status === 409) return { leases: [], total: 0 };
  throw error;
}
