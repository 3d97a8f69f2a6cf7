// What this key's tenant has used.
//
//   await showUsage(place)

import { element } from "./dom.js";
import { getJson } from "./gateway.js";

export async function showUsage(place) {
  let usage;
  try {
    usage = await getJson("/v1/usage");
  } catch (error) {
    const message = error.status === 404 ? "This gateway offers no usage." : error.message;
    place.replaceChildren(element("p", { class: "empty" }, message));
    return;
  }
  const rows = usage.data;
  if (!rows.length) {
    place.replaceChildren(element("p", { class: "empty" }, "Nothing was used yet."));
    return;
  }
  // What is zero everywhere says nothing.
  const names = Object.keys(rows[0]).filter((name) => rows.some((row) => row[name] !== 0));
  const cell = (kind, name, text) => element(
    kind, { class: typeof rows[0][name] === "number" ? "number" : false }, text,
  );
  place.replaceChildren(element("div", { class: "panel scrolls" }, element("table", {},
    element("caption", {}, captionOf(usage)),
    element("thead", {}, element("tr", {}, names.map((name) => cell("th", name, titleOf(name))))),
    element("tbody", {}, rows.map((row) => element(
      "tr", {}, names.map((name) => cell("td", name, shown(row[name]))),
    ))))));
}

const captionOf = ({ tenant, since }) => [
  tenant && `Tenant ${tenant}`, since && `since ${new Date(since).toLocaleString()}`,
].filter((part) => part).join(", ");
const titleOf = (name) => name.replaceAll("_", " ");
const shown = (value) => (typeof value === "number" ? value.toLocaleString("en") : String(value ?? "–"));
