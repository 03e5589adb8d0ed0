// The page that asks for a token.

import { token } from "./api.js";
import { h, show } from "./dom.js";

/** Ask for a token; `done` when there is one to try. */
export function render(main, reason, done) {
  const input = h("input", { type: "password", id: "token", autocomplete: "off", required: true, spellcheck: "false" });
  const submit = (event) => {
    event.preventDefault();
    token.set(input.value.trim());
    done();
  };
  show(
    main,
    h(
      "form",
      { class: "card stack token", onsubmit: submit },
      h("h1", null, "A token, please"),
      h("p", null, "The read token lets you look at everything; the admin token also lets you act."),
      reason && h("p", { class: "error", role: "alert" }, "This token was not accepted."),
      h("label", { class: "field" }, "Token", input),
      h("div", null, h("button", { class: "primary", type: "submit" }, "Open the dashboard")),
      h("p", { class: "small muted" }, "It is kept in this tab alone, and forgotten when the tab is closed."),
    ),
  );
  input.focus();
}
