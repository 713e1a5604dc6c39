(() => {
  const { data, byId, make, number, percent, fill, blend, walk, introduce, SEQUENTIAL, DIVERGING } = page;
  const roles = data.models;
  const based = data.vectors === "task vectors";
  const several = roles.length > 1;

  // --- cells: all tensors of one layer and one kind ---------------------------------------------------------------

  const keyOf = (stack, layer, kind) => JSON.stringify([stack, layer, kind]);
  const cells = new Map();
  for (const sums of data.by_layer_and_kind) {
    cells.set(keyOf(sums.stack, sums.layer, sums.kind), { sums, tensors: [] });
  }
  for (const found of Object.values(data.tensors)) {
    const tensor = { ...found, decision: found.decision ?? found.recorded };
    cells.get(keyOf(tensor.stack, tensor.layer, tensor.kind)).tensors.push(tensor);
  }

  const mean = (values) => {
    const known = values.filter((value) => typeof value === "number");
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };
  const pairs = roles.flatMap((_, i) => roles.slice(i + 1).map((_, j) => [i, i + 1 + j]));

  // --- what can be shown ------------------------------------------------------------------------------------------

  const share = (value) => (value === null ? "" : (100 * value).toFixed(value < 0.0995 ? 1 : 0));
  const plainNumber = (value) => (value === null ? "" : Math.abs(value) >= 1000 ? String(Math.round(value)) : number(value, 2));
  const signed = (value) => (value === null ? "" : value.toFixed(2));

  const cosineDigits = based ? 3 : 7; // of models of one base, which are 1 to three digits
  const measures = [];
  const offer = (group, label, unit, of, look = {}) => {
    const measure = { group, label, unit, of, stops: SEQUENTIAL, text: share, ...look };
    if ([...cells.values()].some((cell) => measure.of(cell) !== null)) measures.push(measure);
  };
  const each = (group, unit, of, look = {}) => {
    if (several) offer(group, `${group}: mean of the models`, unit, (cell) => mean(roles.map((role) => of(cell, role))), look);
    for (const role of roles) offer(group, `${group} of ${role}`, unit, (cell) => of(cell, role), look);
  };
  const kept = (name) => (cell, role) => (cell.sums.kept ? cell.sums.kept[role][name] : null);

  offer("Sign conflicts", "Sign conflicts", "% of shared elements", ({ sums }) => (sums.conflicts ? sums.conflicts.share : null));
  if (based) each("Size", "|d| / |B| in %", ({ sums }, role) => (sums.relative ? sums.relative[role] : null));
  else each("Norm", "", ({ sums }, role) => (sums.norms ? sums.norms[role] : null), { text: plainNumber });
  if (several) {
    const look = { stops: DIVERGING, range: [-1, 1], text: signed };
    const cosine = ([i, j]) => ({ sums }) => (sums.cosines ? sums.cosines[i][j] : null);
    if (pairs.length > 1) offer("Cosine", "Cosine: mean of all pairs", "", (cell) => mean(pairs.map((pair) => cosine(pair)(cell))), look);
    for (const [i, j] of pairs) offer("Cosine", `Cosine of ${roles[i]} and ${roles[j]}`, "", cosine([i, j]), look);
  }
  each("Kept", "% of elements", kept("share"));
  each("Kept energy", "% of the squared norm", kept("energy"));
  each("Agreement", "% of kept elements that are not 0", kept("agreeing"));
  offer("Angle", "Angle between base and the model", "degrees", (cell) => {
    const angle = mean(cell.tensors.map((tensor) => tensor.angle));
    return angle === null ? null : (angle * 180) / Math.PI;
  }, { text: plainNumber });
  for (const role of ["base", ...roles]) {
    offer("Coefficient", `Coefficient of ${role}`, "mean of the tensors", (cell) => mean(cell.tensors.map((tensor) => tensor.coefficients[role])), { text: plainNumber });
  }
  const decided = new Map();
  const elsewhere = new Set(["coefficients", "shares", "average", "kept"]); // shown by role, and as shares
  for (const { decision } of [...cells.values()].flatMap((cell) => cell.tensors)) {
    for (const [name, value] of Object.entries(decision ?? {})) {
      if (elsewhere.has(name)) continue;
      if (typeof value === "number") decided.set(name, 0);
      else if (Array.isArray(value)) decided.set(name, Math.max(decided.get(name) ?? 0, value.length));
    }
  }
  for (const [name, length] of decided) {
    const title = name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
    const at = (place) => (cell) => mean(cell.tensors.map(({ decision }) => {
      const value = (decision ?? {})[name];
      return place === null ? value : Array.isArray(value) ? value[place] : null;
    }));
    if (length === 0) offer("Decided", title, "mean of the tensors", at(null), { text: plainNumber });
    for (let place = 0; place < length; place += 1) {
      const whose = length === roles.length ? `of ${roles[place]}` : `${place + 1} of ${length}`;
      offer("Decided", `${title} ${whose}`, "mean of the tensors", at(place), { text: plainNumber });
    }
  }

  // --- building the maps once -------------------------------------------------------------------------------------

  const short = (kind) =>
    kind.replace("self-attention ", "self ").replace("cross-attention ", "cross ").replace(/^(feed-forward|attention) (.)/, "$2");
  const layerName = (layer) => (layer === null ? "outside layers" : `layer ${layer}`);
  const drawn = [];

  const buildMap = (stack) => {
    const own = data.by_layer_and_kind.filter((each) => each.stack === stack);
    const kinds = [...new Set(own.map((each) => each.kind))];
    const layers = [...new Set(own.map((each) => each.layer))].sort((a, b) => (a === null) - (b === null) || a - b);
    const table = make("table", { class: "map values", role: "grid", "aria-label": `${stack}, layers by kinds of tensors` });
    table.style.minWidth = `${4 + kinds.length * 3.4}rem`; // a narrow screen scrolls the map, not the page
    const head = make("tr", { role: "row" }, make("th", { scope: "col", class: "layer", text: "layer" }));
    for (const kind of kinds) head.append(make("th", { scope: "col", text: short(kind), title: kind }));
    const body = make("tbody");
    for (const layer of layers) {
      const row = make("tr", { role: "row" });
      row.append(make("th", { scope: "row", text: layer ?? "–", title: layerName(layer) }));
      for (const kind of kinds) {
        const cell = cells.get(keyOf(stack, layer, kind));
        const element = make("td", { role: "gridcell", tabindex: "-1", data: { key: keyOf(stack, layer, kind) } });
        if (cell) drawn.push({ cell, element, name: `${stack} ${layerName(layer)}, ${kind}` });
        else element.setAttribute("aria-label", "no tensor");
        row.append(element);
      }
      body.append(row);
    }
    const first = body.querySelector("[role=gridcell]");
    if (first) first.tabIndex = 0;
    table.append(make("thead", {}, head), body);
    table.addEventListener("keydown", walk);
    return make("figure", {}, make("figcaption", { text: stack }), make("div", { class: "scroll" }, table));
  };

  const legend = { low: make("span"), bar: make("span", { class: "bar", role: "img" }), high: make("span"), label: make("span", { class: "hint" }) };
  if (measures.length) {
    const stacks = [...new Set(data.by_layer_and_kind.map((each) => each.stack))];
    byId("maps").append(make("div", { class: "legend" }, ...Object.values(legend)), make("div", { class: "stacks" }, ...stacks.map(buildMap)));
  } else {
    byId("controls").hidden = true;
    byId("maps").append(make("p", { class: "hint", text: "There is nothing to draw: no sources were given, and the method records no number of a tensor." }));
  }
  const byKey = new Map(drawn.map((each) => [each.element.dataset.key, each]));

  const describe = (element) => {
    const found = byKey.get(element.dataset.key);
    if (!found) return;
    const { sums, tensors } = found.cell;
    const parts = [`${found.name}: ${sums.tensors} tensors, ${sums.elements} elements` + (sums.copied ? `, ${sums.copied} copied` : "")];
    if (sums.conflicts && several) parts.push(`signs conflict in ${percent(sums.conflicts.share)} of ${sums.conflicts.shared} shared elements`);
    if (sums.relative) parts.push(`size ${roles.map((role) => (sums.relative[role] === null ? "-" : `${number(100 * sums.relative[role], 3)} %`)).join(", ")}`);
    if (sums.cosines && several) parts.push(`cosines ${pairs.map(([i, j]) => number(sums.cosines[i][j], cosineDigits)).join(", ")}`);
    if (sums.kept) parts.push(`kept ${roles.map((role) => percent(sums.kept[role].share)).join(", ")}`);
    const coefficients = ["base", ...roles].map((role) => mean(tensors.map((tensor) => tensor.coefficients[role])));
    if (coefficients.some((value) => value !== null)) parts.push(`coefficients ${coefficients.filter((value) => value !== null).map((value) => number(value, 4)).join(", ")}`);
    byId("detail").textContent = parts.join("; ");
  };
  for (const type of ["pointerover", "focusin"]) {
    byId("maps").addEventListener(type, (event) => {
      const element = event.target.closest?.("[role=gridcell]");
      if (element) describe(element);
    });
  }

  // --- drawing ----------------------------------------------------------------------------------------------------

  const paint = (element, stops, place, text) => {
    const colour = blend(stops, place);
    const [red, green, blue] = colour.match(/\d+/g).map(Number);
    element.style.backgroundColor = colour;
    element.style.color = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#14181b" : "#ffffff";
    element.textContent = text;
  };

  const draw = () => {
    const measure = measures[Number(byId("measure").value)];
    const values = drawn.map(({ cell }) => measure.of(cell));
    const known = values.filter((value) => value !== null);
    const [low, high] = measure.range ?? [Math.min(...known), Math.max(...known)];
    drawn.forEach(({ cell, element, name }, index) => {
      const value = values[index];
      const copied = cell.sums.copied === cell.sums.tensors;
      element.setAttribute("aria-label", `${name}: ${value !== null ? measure.text(value) : copied ? "equal in all sources" : "not known"}`);
      if (value === null) {
        element.removeAttribute("style");
        element.textContent = copied ? "=" : "";
      } else paint(element, measure.stops, high > low ? (value - low) / (high - low) : 1, measure.text(value));
    });
    legend.low.textContent = measure.text(low);
    legend.high.textContent = measure.text(high);
    const equal = drawn.some(({ cell }, index) => values[index] === null && cell.sums.copied === cell.sums.tensors);
    legend.label.textContent = (measure.unit ? `${measure.label}, ${measure.unit}` : measure.label) + (equal ? "; = equal in all sources" : "");
    legend.bar.style.background = `linear-gradient(to right, ${measure.stops.join(", ")})`;
    legend.bar.setAttribute("aria-label", `colour scale of ${measure.label}: from ${measure.text(low)} to ${measure.text(high)}`);
  };

  // --- tables -----------------------------------------------------------------------------------------------------

  const columns = (rows, head) => {
    const used = head.map((_, i) => i === 0 || rows.some((row) => row[i] !== "-"));
    const take = (list) => list.filter((_, i) => used[i]);
    return [take(head), rows.map(take)];
  };
  const table = (id, rows, head) => {
    const [shownHead, shownRows] = columns(rows, head);
    fill(byId(id), shownHead, shownRows, shownHead.map((_, i) => i).slice(1));
  };
  const small = (value) => (typeof value === "number" ? `${number(100 * value, 3)} %` : "-");
  const share1 = (value) => (typeof value === "number" ? percent(value) : "-");

  const spread = (coefficient) => {
    if (!coefficient) return "-";
    const { least, mean: middle, greatest } = coefficient;
    return greatest - least < 5e-4 * Math.abs(middle) ? number(middle, 3) : `${number(least, 3)} to ${number(greatest, 3)}`;
  };
  const whole = data.whole;
  const modelRows = roles.map((role) => {
    const own = (whole.kept ?? {})[role] ?? {};
    return [
      role, number(whole.norms ? whole.norms[role] : null), small(whole.relative ? whole.relative[role] : null),
      whole.moved ? String(whole.moved[role]) : "-", share1(own.share), share1(own.energy), share1(own.agreeing),
      spread(data.coefficients[role]),
    ];
  });
  if (data.coefficients.base) modelRows.unshift(["base", "-", "-", "-", "-", "-", "-", spread(data.coefficients.base)]);
  table("models", modelRows, ["model", based ? "norm of the task vector" : "norm", "beside base", "elements moved", "kept", "kept energy", "agreement", "coefficient"]);

  if (whole.cosines && several) {
    byId("cosines-section").hidden = false;
    if (!based) byId("cosines-title").textContent = "Cosines of the models";
    const head = make("tr", {}, make("th", { scope: "col" }), ...roles.map((role) => make("th", { scope: "col", text: role })));
    const body = make("tbody");
    whole.cosines.forEach((line, i) => {
      const row = make("tr", {}, make("th", { scope: "row", text: roles[i] }));
      line.forEach((value) => {
        const element = make("td");
        if (value !== null) paint(element, DIVERGING, (value + 1) / 2, number(value, cosineDigits));
        row.append(element);
      });
      body.append(row);
    });
    byId("cosines").append(make("thead", {}, head), body);
  }

  const kindRows = data.by_kind.map((group) => [
    `${group.stack}, ${group.kind}`, String(group.tensors), String(group.copied),
    small(mean(roles.map((role) => (group.relative ?? {})[role]))),
    group.cosines && several ? number(mean(pairs.map(([i, j]) => group.cosines[i][j])), cosineDigits) : "-",
    share1(several && group.conflicts ? group.conflicts.share : null),
    ...["share", "energy", "agreeing"].map((name) => share1(mean(roles.map((role) => (group.kept ? group.kept[role][name] : null))))),
  ]);
  byId("kinds-section").hidden = kindRows.length === 0;
  table("kinds", kindRows, ["where", "tensors", "copied", "size beside base", "cosine", "sign conflicts", "kept", "kept energy", "agreement"]);

  // --- what stands still ------------------------------------------------------------------------------------------

  introduce("models of a merge");
  byId("notes").parentElement.hidden = data.notes.length === 0;
  byId("origin").textContent =
    (data.origin === "sources" ? `What a merge of these sources by method ${data.method} would do` : `A finished merge by method ${data.method}`) +
    (data.origin === "output" ? ", from its provenance" : "") +
    (data.written_by ? `, written by ${data.written_by.name} ${data.written_by.version}.` : ".");
  const conflict = whole.conflicts && several && whole.conflicts.share !== null ? `; signs conflict in ${percent(whole.conflicts.share)} of shared elements` : "";
  byId("summary").textContent =
    `${whole.tensors} tensors of ${(whole.elements / 1e6).toFixed(1)} million elements` +
    (whole.copied ? `, ${whole.copied} of them equal in all sources and copied` : "") + `${conflict}.`;
  const groups = new Map();
  measures.forEach(({ group, label }, index) => {
    if (!groups.has(group)) groups.set(group, make("optgroup", { label: group }));
    groups.get(group).append(make("option", { value: index, text: label }));
  });
  byId("measure").append(...groups.values());
  if (measures.length) {
    byId("measure").addEventListener("change", draw);
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    draw();
  }
})();
