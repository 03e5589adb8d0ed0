// One visit to a page. Its requests, listeners and timers end with it, however late a response arrives: a page that was
// left never draws again.

import { get } from "./api.js";

/**
 * Begin a visit. `get` is the API's, and throws once the visit has ended; `listen(on)` is called with every event of the
 * run; `every(ms, act)` repeats; `attempt(work)` passes the error of a promise that is not awaited to `fail`. A page may
 * set `follow(rest)`: it is called with the end of another address of the same page, instead of a new `render`.
 */
export function begin(address, fail) {
  const end = new AbortController();
  const listeners = new Set();
  const timers = [];
  return {
    address,
    follow: null,
    ended: () => end.signal.aborted,
    async get(path, query) {
      const answer = await get(path, query, end.signal);
      end.signal.throwIfAborted();
      return answer;
    },
    attempt: (work) => void work.catch((error) => end.signal.aborted || fail(error)),
    listen: (on) => void (end.signal.aborted || listeners.add(on)),
    every: (ms, act) => void (end.signal.aborted || timers.push(setInterval(act, ms))),
    tell: (event) => listeners.forEach((on) => on(event)),
    leave() {
      end.abort();
      timers.forEach(clearInterval);
      listeners.clear();
    },
  };
}
