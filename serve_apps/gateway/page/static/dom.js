// Building the page from values. Everything becomes text or an attribute, never HTML.
//
//   element("p", { class: "note" }, "as it is: ", text)

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat());
  return made;
}

// Shows a message in an element kept for problems; an empty one hides it.
export function showProblem(place, message) {
  place.textContent = message;
  place.hidden = message === "";
}

// Fills a <select>, keeping what was chosen if it is still there. Returns whether it changed.
export function fillSelect(select, values) {
  const before = select.value;
  const known = [...select.options].map((option) => option.value);
  if (known.join("\n") === values.join("\n")) return false;
  select.replaceChildren(...values.map((value) => element("option", { value }, value)));
  if (values.includes(before)) select.value = before;
  return select.value !== before;
}
