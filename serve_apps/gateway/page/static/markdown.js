// The Markdown that model cards are written in: headings, tables, paragraphs, code.
//
//   place.append(...renderMarkdown(card))

import { element } from "./dom.js";

export function renderMarkdown(text) {
  return text.split(/\n{2,}/).flatMap((block) => renderBlock(block.split("\n")));
}

function renderBlock(lines) {
  const [first, ...rest] = lines;
  const heading = /^(#{1,4}) (.*)$/.exec(first);
  if (heading) {
    const made = element(`h${heading[1].length + 2}`, {}, ...renderText(heading[2]));
    return rest.length ? [made, ...renderBlock(rest)] : [made];
  }
  if (first.startsWith("|")) return [renderTable(lines)];
  return first ? [element("p", {}, ...renderText(lines.join(" ")))] : [];
}

function renderTable([head, , ...rows]) {
  const heads = cellsOf(head);
  const table = element("table");
  if (heads.every((cell) => cell)) {
    const cells = heads.map((cell) => element("th", { scope: "col" }, cell));
    table.append(element("thead", {}, element("tr", {}, cells)));
  }
  const body = rows.map(cellsOf).map(([name, ...values]) => element(
    "tr", {}, element("th", { scope: "row" }, ...renderText(name)),
    values.map((value) => element("td", {}, ...renderText(value))),
  ));
  table.append(element("tbody", {}, body));
  return element("div", { class: "scrolls" }, table);
}

const cellsOf = (row) => row.replace(/^\| ?| ?\|$/g, "").split(/ \| /)
  .map((cell) => cell.replaceAll("\\|", "|").trim());

const renderText = (text) => text.split(/(`[^`]+`)/).filter((part) => part).map((part) => (
  /^`.+`$/.test(part) ? element("code", {}, part.slice(1, -1)) : part
));
