// One visit to a page: what the page asks for, listens to and repeats ends when the visit does, however late an answer
// comes. A page that was left never draws again.

import { get } from "./api.js";

/**
 * A visit that has begun. `get` is the API's, and throws once the visit has ended; `listen(on)` hears every event of
 * the run; `every(ms, act)` repeats; `attempt(work)` hands the error of a promise that nobody waits for to `fail`.
 * A page may set `follow(rest)`: it gets the end of another address of the same page, in place of being drawn anew.
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
