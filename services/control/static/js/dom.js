// Creates elements. Text is only ever set as text, so that the output of models and environments cannot become markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "mark") element.classList.add(value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An HTML element: h("p", {class: "muted"}, "text", child, [children]). Attributes such as `onclick` take functions. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** A table with a caption for screen readers. Columns: {title, num?, cell: (row) => text or element}. */
export function table(caption, columns, rows, { rowClass } = {}) {
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      null,
      h("caption", { class: "hidden" }, caption),
      h("thead", null, h("tr", null, columns.map((column) => h("th", { scope: "col", class: column.num && "num" }, column.title)))),
      h(
        "tbody",
        null,
        rows.map((row) =>
          h("tr", { class: rowClass?.(row) }, columns.map((column) => h("td", { class: column.num && "num" }, column.cell(row)))),
        ),
      ),
    ),
  );
}

/** Replace the children of `element`. */
export function show(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
}

/** Show a modal dialog and return whether it was confirmed. */
export function confirm(title, text, yes, { danger = false, extra = null } = {}) {
  return new Promise((resolve) => {
    let answer = false;
    const dialog = h("dialog", { "aria-labelledby": "dialog-title", onclose: () => (dialog.remove(), resolve(answer)) });
    const accept = h("button", { type: "button", class: danger ? "danger" : "primary", onclick: () => ((answer = true), dialog.close()) }, yes);
    const refuse = h("button", { type: "button", autofocus: true, onclick: () => dialog.close() }, "Cancel");
    dialog.append(
      h("div", { class: "stack" }, h("h2", { id: "dialog-title" }, title), h("p", null, text), extra, h("div", { class: "row" }, accept, refuse)),
    );
    document.body.append(dialog);
    dialog.showModal();
  });
}
