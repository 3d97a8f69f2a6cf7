// The models that are served: each with its versions, their shares of the traffic, their cards.
//
//   const models = await readCatalogue(); showCatalogue(place, models);

import { element } from "./dom.js";
import { getJson } from "./gateway.js";
import { renderMarkdown } from "./markdown.js";

export async function readCatalogue() {
  return (await getJson("/v1/catalogue")).data;
}

// The version that speaks for a name: the one with the largest share of those that can be opened.
export function leading(model) {
  const opened = model.versions.filter((version) => !version.error);
  return opened.sort((a, b) => b.share - a.share)[0];
}

// Draws anew, leaving open the cards that were.
export function showCatalogue(place, models) {
  const open = new Set([...place.querySelectorAll("details[open]")].map((card) => card.dataset.of));
  place.replaceChildren(...models.map(showModel));
  for (const card of place.querySelectorAll("details")) card.open = open.has(card.dataset.of);
  if (!models.length) {
    place.append(element("p", { class: "empty" }, "Nothing is served yet: ",
      element("code", {}, "heliostat deploy REF")));
  }
}

function showModel(model) {
  const lead = leading(model);
  return element("article", { class: "panel model", "aria-label": model.id },
    element("div", { class: "title" },
      element("h2", {}, model.id),
      element("span", { class: "kind" }, lead ? lead.kind.replace("_", " ") : "unreadable"),
      element("span", { class: "note" }, lead ? factsOf(lead) : "")),
    showTraffic(model.versions),
    element("ul", { class: "versions" }, model.versions.map((version) => showVersion(model, version))));
}

function factsOf(version) {
  if (version.max_model_len) {
    const chat = version.has_chat_template ? "chat and completion" : "completion";
    return `${version.max_model_len.toLocaleString("en")} tokens of context, ${chat}`;
  }
  const names = (specs) => specs.map((spec) => spec.name).join(", ");
  return version.inputs ? `${names(version.inputs)} → ${names(version.outputs)}` : "";
}

function showTraffic(versions) {
  const shares = versions.filter((version) => version.share > 0);
  const said = shares.map((version) => `version ${version.version} ${percent(version.share)}`);
  const bar = element("div", {
    class: "traffic", role: "img", "aria-label": `Traffic: ${said.join(", ") || "none"}`,
  });
  for (const { share, state } of shares) {
    const part = element("span", { class: state });
    part.style.flexGrow = share;
    bar.append(part);
  }
  return bar;
}

function showVersion(model, version) {
  const row = element("div", { class: "version" },
    element("span", { class: `state ${version.state}` }, version.state),
    element("strong", {}, `${model.id}/${version.version}`),
    version.aliases.map((alias) => element("span", { class: "alias" }, `@${alias}`)),
    element("span", { class: "share" }, percent(version.share)));
  if (version.error) return element("li", {}, row, element("p", { class: "problem" }, version.error));
  return element("li", {}, row,
    element("details", { "data-of": `${model.id}/${version.version}` },
      element("summary", {}, "Model card"),
      element("div", { class: "card" }, ...renderMarkdown(version.card))));
}

const percent = (share) => `${Number((100 * share).toFixed(share < 0.1 ? 1 : 0))} %`;
