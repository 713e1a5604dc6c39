(() => {
  const { data, byId, make, number, percent, plain, fill, blend, walk, introduce, SEQUENTIAL, DIVERGING } = page;
  const tensors = Object.entries(data.tensors).map(([name, tensor]) => ({ name, ...tensor }));

  // --- the rule of selection, number for number that of the merge ------------------------------------------------

  const roundHalfEven = (x) => {
    const floor = Math.floor(x);
    const rest = x - floor; // exact: both are doubles of like size
    if (rest !== 0.5) return rest > 0.5 ? floor + 1 : floor;
    return floor % 2 === 0 ? floor : floor + 1;
  };

  const keepCount = (k, heads) => {
    const share = k > 1 ? k / 100 : k;
    if (share <= 0) return 0;
    if (share >= 1) return heads;
    return Math.max(1, roundHalfEven(share * heads));
  };

  const select = (tensor, keep) => {
    if (tensor.squared_scores === null && tensor.recorded !== null && keep === tensor.recorded.keep) {
      return new Set(tensor.recorded.selected);
    }
    if (keep === 0) return new Set();
    const values = tensor.squared_scores ?? tensor.scores;
    const cut = [...values].sort((a, b) => b - a)[keep - 1];
    return new Set(values.flatMap((value, head) => (value >= cut ? [head] : [])));
  };

  const marginOf = (tensor, chosen) => {
    const squares = tensor.squared_scores ?? tensor.scores.map((score) => score * score);
    if (chosen.size === 0 || chosen.size === squares.length) return null;
    const last = Math.min(...squares.filter((_, head) => chosen.has(head)));
    const first = Math.max(...squares.filter((_, head) => !chosen.has(head)));
    return last > 0 ? (last - first) / last : 0;
  };

  const coefficient = (lambda, alpha, layer, layers) => Math.pow(lambda, alpha * ((layer + 1) / layers));

  // --- what is shown: null means each tensor's own value ----------------------------------------------------------

  const given = (name) => (typeof data.parameters[name] === "number" ? data.parameters[name] : null);
  const start = { k: given("k"), lambda: given("lambda"), alpha: given("alpha") };
  const state = { ...start };

  const ofTensor = (tensor) => {
    const k = state.k ?? tensor.k;
    const own = (state.lambda ?? tensor.lambda) === tensor.lambda && (state.alpha ?? tensor.alpha) === tensor.alpha;
    const value = own
      ? tensor.lambda_i
      : coefficient(state.lambda ?? tensor.lambda, state.alpha ?? tensor.alpha, tensor.layer, tensor.layers);
    const chosen = select(tensor, keepCount(k, tensor.heads));
    return { chosen, lambda_i: value, margin: marginOf(tensor, chosen) };
  };

  const blockName = (block) => (block === "self_attn" ? "self-attention" : "cross-attention");

  const placeOf = (tensor) =>
    `${tensor.stack} layer ${tensor.layer}, ${blockName(tensor.block)} ${tensor.kind}_proj ${tensor.part}`;

  const COLOURS = {
    score: { label: "Score", values: (t) => t.scores, stops: SEQUENTIAL },
    within: {
      label: "Score, within each tensor",
      values: (t) => {
        const [low, high] = [Math.min(...t.scores), Math.max(...t.scores)];
        return t.scores.map((score) => (high > low ? (score - low) / (high - low) : 1));
      },
      stops: SEQUENTIAL,
      range: [0, 1],
    },
    cosine: { label: "Cosine of tv1 and tv2", values: (t) => t.cosine, stops: DIVERGING, range: [-1, 1] },
    tv1_relative: { label: "Size of tv1, |tv1| / |B|", values: (t) => t.tv1_relative, stops: SEQUENTIAL },
    tv2_relative: { label: "Size of tv2, |tv2| / |B|", values: (t) => t.tv2_relative, stops: SEQUENTIAL },
  };

  // --- building the maps once -------------------------------------------------------------------------------------

  const groups = new Map();
  for (const tensor of tensors) {
    const key = `${tensor.stack} ${blockName(tensor.block)}, ${tensor.part === "weight" ? "weights" : "biases"}`;
    if (!groups.has(key)) groups.set(key, { legend: null, panels: new Map(), tensors: [] });
    const group = groups.get(key);
    if (!group.panels.has(tensor.kind)) group.panels.set(tensor.kind, []);
    group.panels.get(tensor.kind).push(tensor);
    group.tensors.push(tensor);
  }

  const rowsByName = new Map();

  const buildPanel = (key, kind, members) => {
    const heads = Math.max(...members.map((tensor) => tensor.heads));
    const title = `${key}: ${kind}_proj`;
    const dense = heads > 12;
    const table = make("table", { class: dense ? "map dense" : "map", role: "grid", "aria-label": `${title}, layers by heads` });
    table.style.minWidth = `${10 + heads * 0.85}rem`; // a narrow screen scrolls the map, not the page
    const head = make("tr", { role: "row" }, make("th", { scope: "col", class: "layer", text: "layer" }));
    for (let h = 0; h < heads; h += 1) head.append(make("th", { scope: "col", text: h }));
    head.append(make("th", { scope: "col", class: "lambda", text: "λᵢ" }), make("th", { scope: "col", class: "margin", text: "margin" }));
    const body = make("tbody");
    for (const tensor of members) {
      const row = make("tr", { role: "row", data: { tensor: tensor.name } });
      row.append(make("th", { scope: "row", text: tensor.layer }));
      const cells = [];
      for (let h = 0; h < heads; h += 1) {
        if (h >= tensor.heads) {
          row.append(make("td"));
          continue;
        }
        const cell = make("td", { role: "gridcell", tabindex: "-1", data: { head: h } });
        cells.push(cell);
        row.append(cell);
      }
      const lambda = make("td", { class: "number lambda" });
      const margin = make("td", { class: "number margin" });
      row.append(lambda, margin);
      rowsByName.set(tensor.name, { tensor, cells, lambda, margin, shown: null });
      body.append(row);
    }
    const first = body.querySelector("[role=gridcell]");
    if (first) first.tabIndex = 0;
    table.append(make("thead", {}, head), body);
    table.addEventListener("keydown", walk);
    return make("figure", {}, make("figcaption", { text: `${kind}_proj` }), make("div", { class: "scroll" }, table));
  };

  const describe = (cell) => {
    const held = rowsByName.get(cell.closest("tr").dataset.tensor);
    const { tensor, shown } = held;
    const head = Number(cell.dataset.head);
    const merged = shown.chosen.has(head);
    const parts = [
      `${tensor.name}, head ${head}: ${merged ? "merged" : "primary's"}`,
      `score ${number(tensor.scores[head], 6)}, rank ${tensor.ranks[head]} of ${tensor.heads}`,
      `λᵢ ${number(shown.lambda_i, 6)}` + (merged ? ` (tv2 weighs ${number(1 - shown.lambda_i, 4)})` : ""),
    ];
    if (tensor.cosine) {
      parts.push(`cosine ${number(tensor.cosine[head])}`);
      parts.push(`|tv1|/|B| ${number(tensor.tv1_relative[head])}, |tv2|/|B| ${number(tensor.tv2_relative[head])}`);
    }
    byId("detail").textContent = parts.join("; ");
  };

  for (const [key, group] of groups) {
    const section = make("section", { "aria-label": key }, make("h2", { text: key }));
    group.legend = {
      low: make("span"),
      bar: make("span", { class: "bar", role: "img" }),
      high: make("span"),
      label: make("span", { class: "hint" }),
    };
    section.append(make("div", { class: "legend" }, ...Object.values(group.legend)));
    const wide = group.tensors.some((tensor) => tensor.heads > 12);
    const panels = make("div", { class: wide ? "panels wide" : "panels" });
    for (const [kind, members] of group.panels) panels.append(buildPanel(key, kind, members));
    section.append(panels);
    byId("maps").append(section);
  }
  for (const type of ["pointerover", "focusin"]) {
    byId("maps").addEventListener(type, (event) => {
      const cell = event.target.closest?.("[role=gridcell]");
      if (cell) describe(cell);
    });
  }

  // --- drawing ----------------------------------------------------------------------------------------------------

  const drawColours = () => {
    const colour = COLOURS[byId("colour").value];
    for (const group of groups.values()) {
      const all = group.tensors.map((tensor) => colour.values(tensor));
      const known = all.flat().filter((value) => value !== null);
      const [low, high] = colour.range ?? [Math.min(...known), Math.max(...known)];
      group.tensors.forEach((tensor, index) => {
        rowsByName.get(tensor.name).cells.forEach((cell, head) => {
          const value = all[index][head];
          cell.style.backgroundColor =
            value === null ? "transparent" : blend(colour.stops, high > low ? (value - low) / (high - low) : 1);
        });
      });
      const { legend } = group;
      legend.low.textContent = known.length ? number(low, 3) : "-";
      legend.high.textContent = known.length ? number(high, 3) : "-";
      legend.label.textContent = `${colour.label.toLowerCase()}: one scale for all maps of this block`;
      legend.bar.style.background = `linear-gradient(to right, ${colour.stops.join(", ")})`;
      legend.bar.setAttribute("aria-label", `colour scale of ${colour.label}: from ${number(low, 3)} to ${number(high, 3)}`);
    }
  };

  const drawAgreement = () => {
    const rows = [];
    for (const each of data.agreement) {
      const members = tensors.filter((t) =>
        t.stack === each.stack && t.layer === each.layer && t.block === each.block && t.part === each.part && t.kind in each.selected);
      const sets = members.map((tensor) => rowsByName.get(tensor.name).shown.chosen);
      const union = new Set(sets.flatMap((chosen) => [...chosen]));
      const common = [...union].filter((head) => sets.every((chosen) => chosen.has(head))).sort((a, b) => a - b);
      const chance = members[0].heads * sets.reduce((product, chosen) => product * (chosen.size / members[0].heads), 1);
      rows.push([
        `${each.stack} ${each.layer}`, blockName(each.block), each.part, common.join(", ") || "-",
        `${common.length} of ${union.size}`, chance.toFixed(2), union.size ? (common.length / union.size).toFixed(2) : "-",
      ]);
    }
    byId("agreement-section").hidden = rows.length === 0;
    fill(byId("agreement"), ["layer", "block", "part", "common heads", "common of any", "by chance", "Jaccard"], rows, [4, 5, 6]);
  };

  const drawSelection = () => {
    let merged = 0;
    let total = 0;
    let narrowest = null;
    for (const held of rowsByName.values()) {
      const { tensor, cells } = held;
      const shown = (held.shown = ofTensor(tensor));
      merged += shown.chosen.size;
      total += tensor.heads;
      if (shown.margin !== null && (narrowest === null || shown.margin < narrowest.margin)) {
        narrowest = { margin: shown.margin, place: placeOf(tensor) };
      }
      cells.forEach((cell, head) => {
        const on = shown.chosen.has(head);
        if (cell.getAttribute("aria-selected") === String(on)) return;
        cell.classList.toggle("on", on);
        cell.setAttribute("aria-selected", String(on));
        cell.setAttribute(
          "aria-label",
          `layer ${tensor.layer}, head ${head}, score ${number(tensor.scores[head])}, ${on ? "merged" : "primary's"}`,
        );
      });
      held.lambda.textContent = shown.lambda_i.toFixed(4);
      held.margin.textContent = shown.margin === null ? "-" : number(shown.margin, 2);
    }
    const values = ["k", "lambda", "alpha"].map((name) => `${name} ${state[name] ?? "per tensor"}`).join(", ");
    const narrow = narrowest === null ? "" : ` Narrowest margin ${number(narrowest.margin, 2)}, in ${narrowest.place}.`;
    byId("summary").textContent = `${merged} of ${total} heads merged in ${tensors.length} tensors at ${values}.${narrow}`;
    drawAgreement();
  };

  // --- controls ---------------------------------------------------------------------------------------------------

  const wrong = new Map();
  const say = (name, text) => {
    if (text) wrong.set(name, text);
    else wrong.delete(name);
    byId("range").textContent = [...wrong.values()].join(" ");
    byId("range").hidden = wrong.size === 0;
  };

  const LIMITS = { k: [0, 100], lambda: [0, 1], alpha: [0, Infinity] };
  const show = (name) => {
    const value = state[name];
    byId(`${name}-number`).value = value ?? "";
    byId(`${name}-number`).placeholder = value === null ? "per tensor" : "";
    byId(name).value = value === null ? 0.5 : name === "k" && value > 1 ? value / 100 : value;
    byId(name).setAttribute("aria-valuetext", value === null ? "per tensor" : String(value));
  };
  for (const name of Object.keys(state)) {
    const set = (value, source) => {
      const [low, high] = LIMITS[name];
      const valid = Number.isFinite(value) && value >= low && value <= high;
      byId(`${name}-number`).setAttribute("aria-invalid", String(!valid));
      say(name, valid ? "" : `${name} must be a number ${Number.isFinite(high) ? `from ${low} to ${high}` : `of at least ${low}`}; the maps still show ${state[name] ?? "each tensor's own value"}.`);
      if (!valid) return;
      state[name] = value;
      if (source !== "number") show(name);
      else byId(name).value = name === "k" && value > 1 ? value / 100 : value;
      byId(name).setAttribute("aria-valuetext", String(value));
      drawSelection();
    };
    byId(name).addEventListener("input", (event) => set(Number(event.target.value), "range"));
    byId(`${name}-number`).addEventListener("input", (event) => set(event.target.valueAsNumber, "number"));
    show(name);
  }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("reset").addEventListener("click", () => {
    Object.assign(state, start);
    Object.keys(state).forEach((name) => {
      show(name);
      byId(`${name}-number`).setAttribute("aria-invalid", "false");
      say(name, "");
    });
    drawSelection();
  });
  for (const [value, { label, values }] of Object.entries(COLOURS)) {
    if (tensors.every((tensor) => values(tensor) !== undefined)) byId("colour").append(make("option", { value, text: label }));
  }
  byId("colour").addEventListener("change", drawColours);

  // --- what stands still ------------------------------------------------------------------------------------------

  introduce("heads of a merge");
  byId("origin").textContent =
    (data.origin === "sources" ? "What a merge of these sources would select" : "A finished merge, from its provenance") +
    (data.written_by ? `, written by ${data.written_by.name} ${data.written_by.version}.` : ".");
  if (data.energy) {
    const roles = Object.keys(data.energy);
    const row = (label, of) => [label, ...roles.map((role) => percent(of(data.energy[role])))];
    const names = [...new Set(roles.flatMap((role) => Object.keys(data.energy[role].groups)))];
    byId("energy-section").hidden = false;
    fill(
      byId("energy"),
      ["where", ...roles],
      [
        row("in the target tensors", (e) => e.inside),
        row(`in the heads selected at k ${start.k ?? "per tensor"}`, (e) => e.selected),
        row("elsewhere", (e) => e.elsewhere),
        ["by kind of tensor", ...roles.map(() => "")],
        ...names
          .filter((name) => roles.some((role) => data.energy[role].groups[name] > 0))
          .map((name) => row(`· ${name}`, (e) => e.groups[name] ?? 0)),
      ],
      roles.map((_, i) => i + 1),
    );
  }
  drawColours();
  drawSelection();
})();
