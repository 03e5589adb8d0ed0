// Client of the control plane's API. The token is kept in this tab's session storage and sent in a header, never in a URL.

const KEY = "anchorage-token";
const BASE = "/api/v1";

export class ApiError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (token.get()) headers.set("Authorization", `Bearer ${token.get()}`);
  const response = await fetch(BASE + path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (response.ok) return response;
  let detail = response.statusText;
  try {
    detail = (await response.json()).detail ?? detail;
  } catch {
    // Not a problem document: only the status is known.
  }
  throw new ApiError(response.status, detail);
}

/** The path with the query; values that are null or "" are left out. */
function withQuery(path, query) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

/** GET a path of the API. */
export async function get(path, query = {}, signal) {
  return (await request(withQuery(path, query), { signal })).json();
}

export async function post(path, body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return (await request(path, options)).json();
}

const QUIET_MS = 45000; // the server sends something every 15 s, if only a comment

/**
 * Follow server-sent events until `signal` aborts. `query()` returns what the client has so far, for every new connection;
 * `on(event, data)` is called for each event, `state(connected)` whenever the connection is made or lost.
 */
export async function follow(path, query, on, state, signal) {
  let wait = 1000;
  while (!signal.aborted) {
    const silence = new AbortController();
    let watch;
    const onActivity = () => {
      clearTimeout(watch);
      watch = setTimeout(() => silence.abort(), QUIET_MS);
    };
    onActivity();
    try {
      const options = { signal: AbortSignal.any([signal, silence.signal]), headers: { Accept: "text/event-stream" } };
      const response = await request(withQuery(path, query()), options);
      state(true);
      wait = 1000;
      await read(response.body, on, onActivity);
    } catch (error) {
      if (error instanceof ApiError && [401, 404].includes(error.status)) throw error;
    } finally {
      clearTimeout(watch);
    }
    if (signal.aborted) return;
    state(false);
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(wait * 2, 15000);
  }
}

async function read(body, on, onActivity) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    onActivity();
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      dispatch(text.slice(0, end), on);
      text = text.slice(end + 2);
    }
  }
}

function dispatch(block, on) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  if (data.length) on(event, JSON.parse(data.join("\n")));
}
