// Sorting, filtering and the drill-down. Texts from records reach the page as text nodes only, never as markup.
"use strict";

const records = JSON.parse(document.getElementById("records").textContent);

// The number a cell begins with: its error and its footnote marks do not count. NaN for "-" and "not run".
function value(cell) {
  const strong = cell.querySelector("strong");
  return parseFloat(strong ? strong.textContent : cell.firstChild ? cell.firstChild.textContent : "");
}

function compare(column, numeric, sign) {
  return (one, other) => {
    const [a, b] = [one.cells[column], other.cells[column]];
    if (!numeric) return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
    const [x, y] = [value(a), value(b)];
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what has no number stays below
    return sign * (x - y);
  };
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = table.tBodies[0];
      const numeric = head.classList.contains("number");
      body.append(...[...body.rows].sort(compare(column, numeric, descending ? -1 : 1)));
    });
  });
}

// Rows that hold every word of the filter, whatever its case; "words in quotes" are looked for as they stand.
function filter(text) {
  const words = (text.toLowerCase().match(/"[^"]*"?|\S+/g) || []).map((word) => word.replaceAll('"', ""));
  let shown = 0;
  let all = 0;
  for (const row of document.querySelectorAll("main tbody tr")) {
    const content = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => content.includes(word));
    shown += !row.hidden;
    all += 1;
  }
  document.getElementById("matches").textContent = words.length ? `${shown} of ${all} rows` : "";
}

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  made.append(...children);
  return made;
}

function shown(found) {
  if (found === null || found === undefined) return "-";
  if (typeof found === "number" && !Number.isInteger(found)) return String(Number(found.toPrecision(6)));
  return typeof found === "object" ? JSON.stringify(found) : String(found);
}

function pairs(object) {
  const list = element("dl");
  for (const [name, found] of Object.entries(object || {})) {
    list.append(element("dt", name.replaceAll("_", " ")), element("dd", shown(found)));
  }
  return list;
}

function roles(ledger) {
  const list = element("dl");
  const total = ledger.payload_bytes || 1;
  for (const [role, size] of Object.entries(ledger.bytes_by_role || {})) {
    const bar = element("span");
    bar.className = "share";
    bar.style.width = `${(60 * size) / total}%`;
    list.append(element("dt", role), element("dd", undefined, bar, ` ${(8 * size / ledger.weights).toFixed(4)} bits a weight`));
  }
  return list;
}

function layerTable(layers) {
  const table = element("table");
  const head = table.createTHead().insertRow();
  layers.head.forEach((name) => {
    const cell = element("th", name.replaceAll("_", " "));
    if (layers.rows.some((row) => typeof row[layers.head.indexOf(name)] === "number")) cell.className = "number";
    head.append(cell);
  });
  const body = table.createTBody();
  for (const row of layers.rows) {
    const line = body.insertRow();
    row.forEach((found) => {
      const cell = element("td", shown(found));
      if (typeof found === "number") cell.className = "number";
      line.append(cell);
    });
  }
  makeSortable(table);
  const scroll = element("div", undefined, table);
  scroll.className = "scroll";
  return scroll;
}

function showRun(key) {
  const record = records[key];
  const dialog = document.getElementById("run");
  if (!record) return;
  const { spec, metrics, ledger, layers, phases, environment, model, method, warnings } = record;
  const { bytes_by_role: _roles, ...counts } = ledger;
  const parts = [
    element("h2", `${spec.method.name} on ${spec.model.name}`),
    pairs({ run: key, created: record.created, calibration: spec.calibration, ...method.options }),
    element("h3", "Metrics"),
    ...metrics.map(pairs),
    element("h3", "Stored bits by role"),
    roles(ledger),
    element("h3", "Ledger"),
    pairs(counts),
    element("h3", "Phases"),
    pairs(phases),
    element("h3", "Model and environment"),
    pairs({ ...model, ...environment }),
  ];
  if (warnings && warnings.length) parts.push(element("h3", "Warnings"), ...warnings.map((text) => element("p", text)));
  if (layers.rows.length) parts.push(element("h3", `${layers.rows.length} layers`), layerTable(layers));
  parts.push(element("h3", "Spec"), element("pre", JSON.stringify(spec, null, 1)));
  dialog.querySelector("div").replaceChildren(...parts);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function followHash() {
  const found = /^#run-(.+)$/.exec(location.hash);
  if (found) showRun(decodeURIComponent(found[1]));
}

for (const table of document.querySelectorAll("main table")) makeSortable(table);
const field = document.getElementById("filter");
field.addEventListener("input", () => filter(field.value));
window.addEventListener("hashchange", followHash);
// After closing, a second click on the same run must open it again.
document.getElementById("run").addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
followHash();
