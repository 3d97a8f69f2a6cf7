// The page: the key comes in, the sections follow it.

import { readCatalogue, showCatalogue } from "./catalogue.js";
import { byId, showProblem } from "./dom.js";
import { Drawing } from "./drawing.js";
import { hasKey, useKey } from "./gateway.js";
import { Playground } from "./playground.js";
import { showUsage } from "./usage.js";

const SECTIONS = ["models", "playground", "draw", "usage"];
const PERIOD_MS = 5000;

const playground = new Playground();
const drawing = new Drawing();
let shownCatalogue = "";

function showSection() {
  const asked = location.hash.slice(1);
  const section = SECTIONS.includes(asked) ? asked : SECTIONS[0];
  byId("sign-in").hidden = hasKey();
  byId("sections").hidden = byId("forget-key").hidden = !hasKey();
  for (const name of SECTIONS) byId(name).hidden = !hasKey() || name !== section;
  for (const link of byId("sections").children) {
    if (link.hash === `#${section}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = hasKey() ? `${byId(section).querySelector("h1").textContent} · Heliostat` : "Heliostat";
  if (hasKey() && section === "usage") showUsage(byId("usage-table"));
}

async function refresh() {
  const models = await readCatalogue();
  const text = JSON.stringify(models);
  // The key may have been forgotten meanwhile.
  if (!hasKey() || text === shownCatalogue) return;
  shownCatalogue = text;
  showCatalogue(byId("catalogue"), models);
  playground.offer(models);
  drawing.offer(models);
}

async function connect() {
  const field = byId("key");
  useKey(field.value.trim());
  try {
    await refresh();
  } catch (error) {
    useKey("");
    showProblem(byId("key-problem"), error.message);
    field.select();
    return;
  }
  field.value = "";
  showProblem(byId("key-problem"), "");
  showSection();
  byId("sections").querySelector("[aria-current]").focus();
}

// For a key that is refused from now on.
function dismiss(why) {
  useKey("");
  shownCatalogue = "";
  playground.offer([]);
  drawing.offer([]);
  for (const place of ["catalogue", "usage-table"]) byId(place).replaceChildren();
  showProblem(byId("key-problem"), why);
  showSection();
  byId("key").focus();
}

async function follow() {
  if (!hasKey() || document.hidden || byId("models").hidden) return;
  try {
    await refresh();
    byId("models-note").textContent = "Live";
  } catch (error) {
    if (error.status === 401) dismiss(error.message);
    else byId("models-note").textContent = `Not live: ${error.message}`;
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});
// Nothing is left of a page that is loaded anew.
byId("forget-key").addEventListener("click", () => location.reload());
byId("refresh-usage").addEventListener("click", () => showUsage(byId("usage-table")));
addEventListener("hashchange", () => {
  showSection();
  follow();
});
// A page that the browser keeps for going back must not keep the key.
addEventListener("pagehide", () => useKey(""));
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
setInterval(follow, PERIOD_MS);
showSection();
byId("key").focus();
