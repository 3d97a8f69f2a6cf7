// A request as code to paste elsewhere. The key is never in it, only $OPENAI_API_KEY.
//
//   asCurl("http://127.0.0.1:8000/v1/completions", { model: "m", prompt: "it's" })

import { element } from "./dom.js";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl(url, values) {
  return [
    `curl -sN ${quoted(url)} \\`,
    '  -H "Authorization: Bearer $OPENAI_API_KEY" \\',
    "  -H 'Content-Type: application/json' \\",
    `  -d ${quoted(JSON.stringify(values, null, 2))}`,
  ].join("\n");
}

export function asOpenaiPython(url, values) {
  const [base, path] = url.split(/(?<=\/v1)\//);
  const isChat = path === "chat/completions";
  const text = isChat ? "chunk.choices[0].delta.content or \"\"" : "chunk.choices[0].text";
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${python(base)}, api_key=os.environ["OPENAI_API_KEY"])`,
    `stream = client.${path.replace("/", ".")}.create(`,
    ...Object.entries(values).map(([name, value]) => `    ${name}=${python(value, "    ")},`),
    ")",
    "for chunk in stream:",
    `    print(${text}, end="", flush=True)`,
  ].join("\n");
}

export function asHttpxPython(url, values) {
  return [
    "import os",
    "",
    "import httpx",
    "",
    "answer = httpx.post(",
    `    ${python(url)},`,
    '    headers={"Authorization": f"Bearer {os.environ[\'OPENAI_API_KEY\']}"},',
    `    json=${python(values, "    ")},`,
    ")",
    "print(answer.raise_for_status().json())",
  ].join("\n");
}

// A JSON value as Python writes it; JSON's strings and numbers are Python's too.
function python(value, indent = "") {
  const inner = `${indent}    `;
  if (Array.isArray(value)) {
    if (value.every((item) => typeof item !== "object")) {
      return `[${value.map((item) => python(item)).join(", ")}]`;
    }
    return `[\n${value.map((item) => `${inner}${python(item, inner)},\n`).join("")}${indent}]`;
  }
  if (value !== null && typeof value === "object") {
    const lines = Object.entries(value)
      .map(([name, item]) => `${inner}${JSON.stringify(name)}: ${python(item, inner)},\n`);
    return `{\n${lines.join("")}${indent}}`;
  }
  return { true: "True", false: "False", null: "None" }[String(value)] ?? JSON.stringify(value);
}

// Buttons that copy what `write` says at that moment, and show it.
export function addSnippets(place, writers) {
  const shown = element("pre", { tabindex: "0", hidden: true });
  const status = element("span", { class: "note", role: "status" });
  const buttons = Object.entries(writers).map(([name, write]) => {
    const button = element("button", { type: "button" }, `Copy as ${name}`);
    button.addEventListener("click", async () => {
      shown.textContent = write();
      shown.hidden = false;
      shown.setAttribute("aria-label", `The request as ${name}`);
      try {
        await navigator.clipboard.writeText(shown.textContent);
        status.textContent = "Copied";
      } catch {
        status.textContent = "Select and copy it below";
      }
    });
    return button;
  });
  place.append(element("div", { class: "buttons" }, buttons, status), shown);
}
