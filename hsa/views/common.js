"use strict";
// What the pages of all inspections share; each page's own script comes after it.
const page = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  // --- small helpers; text from files goes through textContent alone ----------------------------------------------

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "text") element.textContent = value;
      else if (key === "data") Object.assign(element.dataset, value);
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  };
  const number = (value, digits = 4) =>
    value === null || value === undefined ? "-" : String(Number(value.toPrecision(digits)));
  const percent = (value) => (value === null ? "-" : `${(100 * value).toFixed(1)} %`);
  const plain = (value) =>
    value === null ? "-" : typeof value === "object" ? JSON.stringify(value, null, 1) : String(value);
  const fill = (table, head, rows, right = []) => {
    const cell = (tag, text, column, extra = {}) => {
      const made = make(tag, { text, data: { label: head[column] }, ...extra });
      if (right.includes(column)) made.className = "right";
      return made;
    };
    table.replaceChildren(
      make("thead", {}, make("tr", {}, ...head.map((text, i) => cell("th", text, i, { scope: "col" })))),
      make("tbody", {}, ...rows.map((row) =>
        make("tr", {}, ...row.map((text, i) => (i === 0 ? cell("th", text, i, { scope: "row" }) : cell("td", text, i))))
      )),
    );
  };

  // --- colours: luminance rises with the value, so that they can be told apart without hue ------------------------

  const SEQUENTIAL = ["#2a3a63", "#3d5f84", "#5b898c", "#99b67e", "#f3d76c"];
  const DIVERGING = ["#a93f2a", "#dd9a82", "#efebe4", "#8db1cb", "#285a86"];
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const blend = (stops, share) => {
    const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
    const index = Math.min(stops.length - 2, Math.floor(place));
    const [from, to] = [channels(stops[index]), channels(stops[index + 1])];
    return `rgb(${from.map((value, i) => Math.round(value + (to[i] - value) * (place - index))).join(" ")})`;
  };

  // --- moving through a map by keys -------------------------------------------------------------------------------

  const walk = (event) => {
    const cell = event.target.closest("[role=gridcell]");
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!cell || !(event.key in steps || event.key === "Home" || event.key === "End")) return;
    const rows = [...cell.closest("tbody").rows].map((row) => [...row.querySelectorAll("[role=gridcell]")]);
    const at = rows.findIndex((row) => row.includes(cell));
    const column = rows[at].indexOf(cell);
    let next;
    if (event.key === "Home") next = rows[at][0];
    else if (event.key === "End") next = rows[at][rows[at].length - 1];
    else next = (rows[at + steps[event.key][0]] ?? [])[column + steps[event.key][1]];
    event.preventDefault();
    if (!next) return;
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  };

  // --- what every page says ---------------------------------------------------------------------------------------

  const introduce = (what) => {
    byId("title").textContent = data.title;
    document.title = `${data.title}: ${what}`;
    byId("warnings").append(...data.warnings.map((text) => make("p", { class: "alert", text: `Warning: ${text}` })));
    byId("notes").append(...data.notes.map((text) => make("li", { text })));
    fill(
      byId("sources"),
      ["source", "id", "revision", "digest of its target bytes"],
      Object.entries(data.sources).map(([role, s]) => [role, s.id, plain(s.revision ?? null), plain(s.targets_blake3 ?? null)]),
    );
    fill(byId("parameters"), ["parameter", "value"], Object.entries(data.parameters).map(([name, v]) => [name, plain(v)]));
  };

  return { data, byId, make, number, percent, plain, fill, blend, walk, introduce, SEQUENTIAL, DIVERGING };
})();
