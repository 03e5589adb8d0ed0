// The shell: which page is shown, for which run, with which token. Addresses are #/RUN/PAGE/….

import { ApiError, follow, get, token } from "./api.js";
import { h, show } from "./dom.js";
import * as actors from "./actors.js";
import * as explorer from "./explorer.js";
import * as run from "./run.js";
import * as runs from "./runs.js";
import * as tokenPage from "./token.js";
import * as trajectories from "./trajectories.js";

const PAGES = { run, trajectories, explorer, actors };
const main = document.getElementById("main");

/** What the pages share: the run's newest facts, and who wants to know when they change. */
const shared = { name: null, me: null, records: [], facts: {}, listeners: new Set(), next: 0, generation: null };
let stop = new AbortController();
let page = { leave() {} };

function tell(event) {
  for (const listener of shared.listeners) listener(event);
}

function onEvent(event, data) {
  if (event === "metrics") {
    if (shared.generation !== null && data.generation !== shared.generation) shared.records = [];
    shared.generation = data.generation;
    shared.records.push(...data.records);
    shared.next = data.next;
  } else {
    shared.facts[event] = data;
    if (event === "run") showBadge(data);
  }
  tell(event);
}

function showBadge(view) {
  const badge = document.getElementById("live-badge");
  if (!view) return show(badge);
  const kind = view.live ? "badge dot good" : "badge dot";
  show(badge, h("span", { class: kind, title: view.note }, view.live ? view.state : "ended"));
}

function openRun(name) {
  if (shared.name === name) return;
  stop.abort();
  stop = new AbortController();
  Object.assign(shared, { name, records: [], facts: {}, next: 0, generation: null });
  showBadge(null);
  if (name === null) return;
  const path = `/runs/${encodeURIComponent(name)}/events`;
  follow(path, () => shared.next, onEvent, () => {}, stop.signal).catch(fail);
}

function fail(error) {
  if (error instanceof ApiError && error.status === 401) return askForToken(error.message);
  show(main, h("p", { class: "error", role: "alert" }, error.message || String(error)));
}

function askForToken(reason) {
  openRun(null);
  tokenPage.render(main, token.get() ? reason : null, start);
}

function showPages(name, current) {
  const titles = { run: "Run", trajectories: "Trajectories", explorer: "Anchor explorer", actors: "Actors and buffer" };
  const links = Object.entries(titles).map(([key, title]) =>
    h("li", null, h("a", { href: `#/${name}/${key}`, "aria-current": key === current && "page" }, title)),
  );
  show(document.getElementById("pages"), name ? h("ul", null, links) : null);
}

async function showPicker(name, current) {
  const place = document.getElementById("run-picker");
  if (!name) return show(place);
  const { runs: all } = await get("/runs");
  const choose = (event) => (location.hash = `#/${event.target.value}/${current}`);
  const options = all.map((one) => h("option", { value: one.name, selected: one.name === name }, one.name));
  show(place, h("label", null, h("span", { class: "hidden" }, "Run"), h("select", { onchange: choose }, options)));
}

async function route() {
  const [name, wanted, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const current = wanted in PAGES ? wanted : "run";
  page.leave();
  page = { leave() {} };
  shared.listeners.clear();
  try {
    shared.me ??= await get("/me");
    document.getElementById("leave").hidden = !token.get();
    openRun(name || null);
    showPages(name, current);
    await showPicker(name, current);
    document.title = name ? `${name} · Anchorage` : "Anchorage";
    page = (await (name ? PAGES[current] : runs).render(main, shared, rest)) ?? page;
  } catch (error) {
    fail(error);
  }
}

function start() {
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
  route().then(() => main.focus({ preventScroll: true }));
});
start();
