// The page that asks for a token.

import { token } from "./api.js";
import { h, show } from "./dom.js";

/** Show the form. `done` is called once a token was entered. */
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
      h("h1", null, "Token required"),
      h("p", null, "The read token shows everything; the admin token also allows actions."),
      reason && h("p", { class: "error", role: "alert" }, "This token was not accepted."),
      h("label", { class: "field" }, "Token", input),
      h("div", null, h("button", { class: "primary", type: "submit" }, "Open the dashboard")),
      h("p", { class: "small muted" }, "The token is kept in this tab only, until the tab is closed."),
    ),
  );
  input.focus();
}
