(() => {
  const { data, byId, make, number, fill } = page;
  const own = data.objective.kind === "own";
  const trials = data.trials;
  const scored = trials.filter((trial) => trial.values.length);
  const valueOf = (trial) => trial.values.reduce((sum, value) => sum + value, 0) / trial.values.length;
  const best = trials.find((trial) => trial.name === data.best);
  const rate = (value, digits = 2) => (100 * value).toFixed(digits);
  const score = (value) => (own ? number(value) : `${rate(value)} %`);
  const axisText = (value) => (own ? number(value, 3) : String(Number((100 * value).toFixed(3))));
  const signed = (value, digits) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(digits)}`;

  // --- settings in words -----------------------------------------------------------------------------------------

  const LETTERS = { lam: "lambda" };
  const settingText = (value) =>
    Array.isArray(value) && !value.some((each) => each !== null && typeof each === "object") ? value.join(", ")
      : value !== null && typeof value === "object" ? "by layer" : String(value);
  const settingsText = (trial) =>
    Object.entries(trial.settings).map(([name, value]) => `${LETTERS[name] ?? name} ${settingText(value)}`).join("; ");
  const about = (trial) => [
    `${trial.number}: ${trial.name}${trial.method && !trial.name.startsWith(trial.method) ? `, ${trial.method}` : ""}`,
    score(valueOf(trial)) + (trial.state === "stopped" ? ` (stopped after ${trial.utterances} utterances)` : ""),
    settingsText(trial),
  ].filter(Boolean).join("\n");

  // --- charts ----------------------------------------------------------------------------------------------------

  const svg = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const label = (x, y, text, anchor) => {
    const element = svg("text", { x, y, "text-anchor": anchor });
    element.textContent = text;
    return element;
  };
  const PALETTE = ["#0b78b6", "#d2691e", "#0a8f6c", "#c26a9b", "#b08900", "#4aa3d8", "#8a6d3b", "#7b6cc4"];
  const methods = [...new Set(trials.map((trial) => trial.method).filter(Boolean))];
  const colour = (trial) => (trial.method === null ? "var(--muted)" : PALETTE[methods.indexOf(trial.method) % PALETTE.length]);

  const steps = (low, high, wanted, whole = false) => {
    const span = high - low || Math.abs(high) || 1;
    const power = 10 ** Math.floor(Math.log10(span / wanted));
    const step = Math.max(whole ? 1 : 0, [1, 2, 5, 10].map((each) => each * power).find((each) => span / each <= wanted) ?? 10 * power);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * span; at += 1) found.push(at * step);
    return found;
  };
  const widened = (low, high) => (low === high ? [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : [low, high]);

  // A chart of points {x, y, trial}. Values of y above `top` are drawn at the upper edge; `line` joins places.
  const chart = ({ points, line = [], width = 640, height = 280, xs, ys, xText, yText, log = false, title, wholeX = false }) => {
    const [left, right, above, below] = [54, 12, 10, 42];
    const scale = log ? Math.log10 : (value) => value;
    const [first, last] = widened(scale(xs[0]), scale(xs[1]));
    const [low, high] = [first - 0.03 * (last - first), last + 0.03 * (last - first)];
    const [bottom, top] = widened(...ys);
    const atX = (x) => left + ((scale(x) - low) / (high - low)) * (width - left - right);
    const atY = (y) => above + (1 - (Math.min(y, top) - bottom) / (top - bottom)) * (height - above - below);
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": title });
    for (const y of steps(bottom, top, 5)) {
      drawing.append(svg("line", { x1: left, x2: width - right, y1: atY(y), y2: atY(y), class: "rule" }), label(left - 6, atY(y) + 4, axisText(y), "end"));
    }
    const ticks = log ? steps(first, last, 5).map((power) => 10 ** power) : steps(first, last, 6, wholeX);
    for (const x of ticks) drawing.append(label(atX(x), height - below + 16, xText.percent ? axisText(x) : number(x, 3), "middle"));
    drawing.append(label(left + (width - left - right) / 2, height - 6, xText.text ?? xText, "middle"));
    const side = label(0, 0, yText, "middle");
    side.setAttribute("transform", `translate(12 ${above + (height - above - below) / 2}) rotate(-90)`);
    drawing.append(side);
    if (line.length > 1) {
      drawing.append(svg("polyline", { points: line.map(([x, y]) => `${atX(x)},${atY(y)}`).join(" "), class: "so-far" }));
    }
    for (const { x, y, trial } of [...points].sort((a, b) => (a.trial === best) - (b.trial === best))) {
      const shape = trial.kind === "sampled"
        ? svg("circle", { cx: atX(x), cy: atY(y), r: trial === best ? 7 : 4.5 })
        : svg("rect", { x: atX(x) - 4.5, y: atY(y) - 4.5, width: 9, height: 9 });
      shape.setAttribute("class", ["point", trial.state, trial === best ? "best" : ""].join(" ").trim());
      shape.style.setProperty("--point", colour(trial));
      const told = svg("title");
      told.textContent = about(trial);
      shape.append(told);
      drawing.append(shape);
    }
    return drawing;
  };

  // The range of scores that a chart shows: hopeless models would press all others together.
  const rangeOf = (values) => {
    const sorted = [...values].sort((a, b) => a - b);
    const low = sorted[0];
    const middle = sorted[Math.floor((sorted.length - 1) / 2)];
    const high = Math.min(sorted[sorted.length - 1], middle + 1.5 * (middle - low) || sorted[sorted.length - 1]);
    const room = (high - low || Math.abs(low) || 1) * 0.06;
    return [low - room, high + room];
  };
  const ys = rangeOf(scored.map(valueOf));
  const unit = own ? "score" : data.objective.kind === "pareto" ? "mean WER %" : "WER %";

  const soFar = [];
  for (const trial of scored) {
    if (trial.state !== "complete" || trial.method === null) continue;
    const value = valueOf(trial);
    const before = soFar.length ? soFar[soFar.length - 1][1] : value;
    if (soFar.length) soFar.push([trial.number, before]);
    soFar.push([trial.number, Math.min(before, value)]);
  }
  byId("history").append(chart({
    points: scored.map((trial) => ({ x: trial.number, y: valueOf(trial), trial })), line: soFar, width: 960, height: 320,
    xs: [1, Math.max(2, trials.length)], ys, xText: "models in the order in which they were scored", yText: unit, wholeX: true,
    title: `Score of each of ${scored.length} models in the order of the search`,
  }));
  const key = (text, colourOf) => {
    const swatch = make("span", { class: "swatch" });
    swatch.style.background = colourOf;
    return make("span", { class: "key" }, swatch, make("span", { text }));
  };
  byId("methods").append(key("not a merge", "var(--muted)"), ...methods.map((name, i) => key(name, PALETTE[i % PALETTE.length])));

  // --- the front -------------------------------------------------------------------------------------------------

  const sets = Object.keys(best.wer);
  if (data.objective.kind === "pareto" && sets.length > 1) {
    byId("front-section").hidden = false;
    for (const id of ["across", "up"]) byId(id).append(...sets.map((name) => make("option", { text: name, value: name })));
    byId("up").value = sets[1];
    const complete = scored.filter((trial) => trial.state === "complete");
    const front = data.front.map((name) => trials.find((trial) => trial.name === name));
    const draw = () => {
      const [across, up] = [byId("across").value, byId("up").value];
      const line = front.map((trial) => [trial.wer[across], trial.wer[up]]).sort((a, b) => a[0] - b[0]);
      const xs = rangeOf(complete.map((trial) => trial.wer[across]));
      byId("front").replaceChildren(chart({
        points: complete.filter((trial) => trial.wer[across] <= xs[1]).map((trial) => ({ x: trial.wer[across], y: trial.wer[up], trial })),
        line: sets.length === 2 ? line : [], width: 640, height: 420, xs, ys: rangeOf(complete.map((trial) => trial.wer[up])),
        xText: { text: `WER % on ${across}`, percent: true }, yText: `WER % on ${up}`, title: `Word error rates on ${across} and ${up}`,
      }));
    };
    byId("axes").addEventListener("input", draw);
    draw();
  }

  // --- settings against score ------------------------------------------------------------------------------------

  const drawnNames = (method) => {
    const found = new Set();
    for (const trial of scored) {
      if (trial.method !== method) continue;
      for (const name of Object.keys(trial.drawn)) if (name !== "method" && name.startsWith(`${method}.`)) found.add(name);
    }
    return [...found];
  };
  const searched = methods.filter((method) => drawnNames(method).length);
  const showSettings = () => {
    const method = byId("method").value;
    const shares = data.importance[method] ?? {};
    const names = drawnNames(method).sort((a, b) => (shares[b] ?? 0) - (shares[a] ?? 0));
    const charts = names.map((name) => {
      const own_ = scored.filter((trial) => trial.method === method && name in trial.drawn);
      const values = own_.map((trial) => trial.drawn[name]);
      const short = name.slice(method.length + 1);
      const share = name in shares ? `importance ${(100 * shares[name]).toFixed(0)} %` : "";
      const caption = make("figcaption", {}, make("span", { text: short }), make("span", { class: "hint", text: ` ${share}` }));
      const choices = [...new Set(values)].filter((value) => typeof value !== "number");
      const place = (value) => (choices.length ? choices.indexOf(value) + 1 : value);
      const xs = values.map(place);
      const log = !choices.length && Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) > 200;
      const text = choices.length ? choices.map((choice, i) => `${i + 1}: ${choice}`).join(", ") : short;
      return make("figure", { data: { setting: name } }, caption, chart({
        points: own_.map((trial) => ({ x: place(trial.drawn[name]), y: valueOf(trial), trial })), width: 380, height: 230,
        xs: [Math.min(...xs), Math.max(...xs)], ys, xText: text, yText: unit, log, wholeX: choices.length > 0, title: `${short} against the score`,
      }));
    });
    byId("settings").replaceChildren(...charts);
  };
  if (searched.length) {
    byId("settings-section").hidden = false;
    byId("method").append(...searched.map((name) => make("option", { text: name, value: name })));
    byId("method").value = searched.includes(best.method) ? best.method : searched[0];
    byId("choice").hidden = searched.length < 2;
    byId("choice").addEventListener("input", showSettings);
    showSettings();
  }

  // --- models side by side on a set ------------------------------------------------------------------------------

  const panel = (rows, name) => {
    const most = Math.max(0.01, ...rows.map((row) => Math.min(row.interval ? row.interval[1] : row.wer, 1.5 * Math.max(row.wer, 0.01))));
    const sorted = [...rows].sort((a, b) => a.wer - b.wer);
    const shownMost = Math.min(most, Math.max(0.05, 3 * sorted[Math.floor((sorted.length - 1) / 2)].wer));
    const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10].find((each) => shownMost / each <= 5) ?? shownMost;
    const end = Math.ceil(shownMost / step - 1e-9) * step;
    const at = (value) => `${(100 * Math.min(value, end)) / end}%`;
    const cells = sorted.flatMap((row) => {
      const track = make("span", { class: "track", role: "img", "aria-label": `${row.model}: ${rate(row.wer)} %` });
      for (let tick = 0; tick <= end + 1e-9; tick += step) {
        const line = make("span", { class: "tick" });
        line.style.left = at(tick);
        track.append(line);
      }
      if (row.interval) {
        const whisker = make("span", { class: "whisker" });
        whisker.style.left = at(row.interval[0]);
        whisker.style.width = `${(100 * (Math.min(row.interval[1], end) - Math.min(row.interval[0], end))) / end}%`;
        track.append(whisker);
        track.title = `${rate(row.interval[0], 1)} to ${rate(row.interval[1], 1)} %`;
      }
      const dot = make("span", { class: row.difference === null ? "dot" : "dot hollow" });
      dot.style.left = at(row.wer);
      if (row.wer <= end) track.append(dot);
      const ends = row.difference_interval ? ` (${signed(row.difference_interval[0], 1)} to ${signed(row.difference_interval[1], 1)})` : "";
      const differs = row.difference === null ? "the best merge" : signed(row.difference, 2) + ends;
      const isBest = row.difference === null ? " best" : "";
      return [
        make("span", { class: `name${isBest}`, text: row.model, title: row.model }),
        track,
        make("span", { class: `value${isBest}`, text: rate(row.wer) + (row.wer > end ? " →" : "") }),
        make("span", { class: `difference ${row.verdict === "better" || row.verdict === "worse" ? row.verdict : ""}`, text: differs }),
      ];
    });
    const axis = make("span", { class: "axis" });
    for (let tick = 0; tick <= end + 1e-9; tick += step) {
      const text = make("span", { text: `${Number((100 * tick).toFixed(2))}` });
      text.style.left = at(tick);
      axis.append(text);
    }
    return make("figure", { data: { set: name } },
      make("figcaption", {}, make("span", { text: name }), make("span", { class: "hint", text: ` ${rows[0].utterances} utterances, ${rows[0].words} words${rows[0].dropped ? `, ${rows[0].dropped} dropped` : ""}` })),
      make("div", { class: "dots differing" }, ...cells, make("span"), axis, make("span", { class: "hint", text: "%" })));
  };
  for (const place of document.querySelectorAll(".level")) place.textContent = `${Number((100 * data.confidence).toFixed(4))} %`;
  for (const split of ["test", "dev"]) {
    const rows = data[split];
    byId(`${split}-section`).hidden = rows.length === 0;
    byId(split).append(...[...new Set(rows.map((row) => row.set))].map((name) => panel(rows.filter((row) => row.set === name), name)));
  }

  // --- all models ------------------------------------------------------------------------------------------------

  const ROWS = 25;
  let limit = ROWS;
  const list = () => {
    const rank = (trial) => (trial.state === "complete" ? valueOf(trial) : trial.values.length ? 1e9 + valueOf(trial) : Infinity);
    const rows = byId("by").value === "score" ? [...trials].sort((a, b) => rank(a) - rank(b) || a.number - b.number) : trials;
    const several = sets.length > 1;
    const head = ["model", "method", "objective", ...(several ? sets.map((name) => `WER % on ${name}`) : []), "state", "settings"];
    fill(byId("trials"), head, rows.slice(0, limit).map((trial) => [
      trial.name, trial.method ?? "", trial.values.length ? score(valueOf(trial)) : "-",
      ...(several ? sets.map((name) => (name in trial.wer ? rate(trial.wer[name]) : "-")) : []),
      trial.failure ?? trial.state, settingsText(trial),
    ]), [2]);
    byId("more").hidden = rows.length <= limit;
    byId("more").textContent = `Show all ${rows.length}`;
  };
  byId("by").addEventListener("input", list);
  byId("more").addEventListener("click", () => { limit = Infinity; list(); });
  list();

  // --- the worst utterances --------------------------------------------------------------------------------------

  const CLASSES = { "=": "equal", s: "substitute", d: "delete", i: "insert" };
  const heard = (pairs) => pairs.map(([kind, ours, theirs]) => {
    const tag = kind === "d" ? "del" : kind === "i" ? "ins" : "span";
    return make(tag, { class: `word ${CLASSES[kind]}`, text: kind === "d" ? ours : theirs, title: kind === "s" ? `${ours} → ${theirs}` : "" });
  });
  byId("worst-section").hidden = data.worst.length === 0;
  byId("worst").append(...data.worst.map((row) => make("figure", { class: "utterance", data: { id: row.id } },
    make("figcaption", {}, make("span", { text: row.id }), make("span", { class: "hint", text: ` ${row.set}` })),
    make("dl", { class: "sides" },
      make("dt", { text: "reference" }), make("dd", { text: row.reference }),
      make("dt", { text: `${data.best}, ${row.best_errors} errors` }), make("dd", {}, ...heard(row.best_pairs)),
      make("dt", { text: `${data.best_baseline}, ${row.other_errors} errors` }), make("dd", {}, ...heard(row.other_pairs))),
    ...(row.best_cut || row.other_cut ? [make("p", { class: "hint", text: "The rest is not shown." })] : []))));

  // --- in words --------------------------------------------------------------------------------------------------

  byId("summary").textContent = `Best of ${trials.length} models by ${data.objective.text}: ${best.name}, method ${best.method}, ${score(valueOf(best))}.`;
  byId("origin").textContent = settingsText(best);
  byId("command").textContent = data.command;
  byId("warnings").append(...data.warnings.map((text) => make("p", { class: "alert", text: `Warning: ${text}` })));
  byId("notes").append(...data.notes.map((text) => make("li", { text })));
  byId("notes-section").hidden = data.notes.length === 0;
  const share = data.seconds ? (100 * data.merging) / data.seconds : 0;
  const spared = data.savings;
  const whole = spared ? spared.decoded + spared.raced + spared.equal : 0;
  byId("cost").textContent = `${trials.length} models in ${data.seconds.toFixed(0)} s, ${share.toFixed(1)} % of it outside of scoring.` +
    (spared ? ` ${spared.decoded} of ${whole} utterances were decoded: racing skipped ${spared.raced}, and ${spared.equal} were known from models with the same weights.` : "");
})();
