// The shell: chooses the page, the run and the token. Addresses are #/RUN/PAGE/….

import { ApiError, follow, token } from "./api.js";
import { h, show } from "./dom.js";
import * as actors from "./actors.js";
import * as explorer from "./explorer.js";
import * as run from "./run.js";
import * as runs from "./runs.js";
import * as tokenPage from "./token.js";
import * as trajectories from "./trajectories.js";
import { begin } from "./visit.js";

const PAGES = { run, trajectories, explorer, actors };
const TITLES = { run: "Run", trajectories: "Trajectories", explorer: "Anchor explorer", actors: "Actors and buffer" };
const main = document.getElementById("main");

/** State that the pages share: the caller's role, and the newest data of the current run. */
const shared = { name: null, me: null, records: [], facts: {}, next: 0, generation: null, connected: true };
let stop = new AbortController();
let visit = begin(null, fail);

function onEvent(event, data) {
  if (event === "metrics") {
    // Records that were rewritten are sent again from the start and replace the old ones.
    shared.records = [...shared.records.slice(0, data.next - data.records.length), ...data.records];
    shared.generation = data.generation;
    shared.next = data.next;
  } else {
    shared.facts[event] = data;
    shared.facts[`${event}At`] = Date.now();
    if (event === "run") showBadge();
  }
  visit.tell(event);
}

function showBadge() {
  const badge = document.getElementById("live-badge");
  const view = shared.facts.run;
  const away = "The control plane does not respond. The page shows its last data and keeps reconnecting.";
  if (shared.name && !shared.connected) return show(badge, h("span", { class: "badge dot bad", title: away }, "no connection"));
  if (!view) return show(badge);
  return show(badge, h("span", { class: view.live ? "badge dot good" : "badge dot", title: view.note }, view.live ? view.state : "ended"));
}

function openRun(name) {
  if (shared.name === name) return;
  stop.abort();
  stop = new AbortController();
  Object.assign(shared, { name, records: [], facts: {}, next: 0, generation: null, connected: true });
  showBadge();
  if (name === null) return;
  const known = () => ({ after: shared.next, generation: shared.generation });
  const { signal } = stop;
  const onConnection = (connected) => {
    if (signal.aborted) return;
    shared.connected = connected;
    showBadge();
  };
  const onData = (event, data) => signal.aborted || onEvent(event, data);
  follow(`/runs/${encodeURIComponent(name)}/events`, known, onData, onConnection, signal).catch((error) => {
    if (signal.aborted) return;
    shared.name = null; // so that opening the run again reconnects
    fail(error);
  });
}

function fail(error) {
  if (error instanceof ApiError && error.status === 401) return askForToken(error.message);
  visit.leave();
  show(main, h("p", { class: "error", role: "alert" }, error.message || String(error)));
}

function askForToken(reason) {
  visit.leave();
  openRun(null);
  showPages(null);
  show(document.getElementById("run-picker"));
  document.title = "Token · Anchorage";
  tokenPage.render(main, token.get() ? reason : null, start);
}

function showPages(name, current) {
  const links = Object.entries(TITLES).map(([key, title]) =>
    h("li", null, h("a", { href: `#/${name}/${key}`, "aria-current": key === current && "page" }, title)),
  );
  show(document.getElementById("pages"), name ? h("ul", null, links) : null);
}

async function showPicker(here, name, current) {
  const place = document.getElementById("run-picker");
  if (!name) return show(place);
  const { runs: all } = await here.get("/runs");
  const choose = (event) => (location.hash = `#/${event.target.value}/${current}`);
  const options = all.map((one) => h("option", { value: one.name, selected: one.name === name }, one.name));
  show(place, h("label", null, h("span", { class: "hidden" }, "Run"), h("select", { onchange: choose }, options)));
}

/** Show the page of the current address. Returns true if it is another page. */
async function route() {
  const [name, wanted, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const current = wanted in PAGES ? wanted : "run";
  const address = name ? `${name}/${current}` : "";
  const same = visit.follow !== null && visit.address === address && !visit.ended();
  if (!same) {
    visit.leave();
    visit = begin(address, fail);
  }
  const here = visit;
  try {
    if (same) await here.follow(rest);
    else await open(here, name, current, rest);
  } catch (error) {
    if (!here.ended()) fail(error);
  }
  return !same && !here.ended();
}

async function open(here, name, current, rest) {
  shared.me ??= await here.get("/me");
  document.getElementById("leave").hidden = !token.get();
  openRun(name || null);
  showPages(name, current);
  await showPicker(here, name, current);
  document.title = name ? `${TITLES[current]} · ${name} · Anchorage` : "Runs · Anchorage";
  await (name ? PAGES[current] : runs).render(main, shared, rest, here);
}

function start() {
  visit.leave();
  shared.me = null;
  shared.name = null;
  route();
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("anchorage-theme", root.dataset.theme);
}

const kept = localStorage.getItem("anchorage-theme");
if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
document.getElementById("theme").addEventListener("click", switchTheme);
document.getElementById("leave").addEventListener("click", () => (token.forget(), (shared.me = null), askForToken(null)));
addEventListener("hashchange", () => {
  if (location.hash === "#main") return;
  route().then((isNew) => isNew && main.focus({ preventScroll: true }));
});
start();
