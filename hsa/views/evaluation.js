(() => {
  const { data, byId, make, plain, fill, blend } = page;
  const models = data.models;
  const names = models.map((model) => model.name);
  const baseline = data.baseline === null ? -1 : names.indexOf(data.baseline);
  const several = data.sets.length > 1;

  // --- scores -----------------------------------------------------------------------------------------------------

  const rate = (value, digits = 2) => (value === null ? "-" : (100 * value).toFixed(digits));
  const signed = (value, digits) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(digits)}`;
  const interval = (low, high, text) => (low === null ? "" : `${text(low, 1)} to ${text(high, 1)}`);
  const scoreOf = (model, group, name) => model.scores.find((score) => score.group === group && score.name === name);
  const groupsOf = (group) => models[0].scores.filter((score) => score.group === group).map((score) => score.name);
  const clear = (score) => score.difference_low !== null && (score.difference_low > 0 || score.difference_high < 0);
  const verdict = (score) => (!clear(score) ? "" : score.difference < 0 ? "better" : "worse");
  const difference = (score) => {
    if (score.difference === null) return "";
    const ends = interval(score.difference_low, score.difference_high, signed);
    return signed(score.difference, 2) + (ends ? ` (${ends})` : "");
  };

  // --- dots and intervals of the models on one set ----------------------------------------------------------------

  const panel = (group, name) => {
    const scores = models.map((model) => scoreOf(model, group, name));
    const most = Math.max(0.01, ...scores.map((score) => score.wer_high ?? score.wer));
    const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10].find((each) => most / each <= 5) ?? most;
    const end = Math.ceil(most / step - 1e-9) * step;
    const best = Math.min(...scores.map((score) => score.wer));
    const at = (value) => `${(100 * value) / end}%`;
    const rows = scores.flatMap((score, i) => {
      const track = make("span", { class: "track", role: "img", "aria-label": `${names[i]}: ${rate(score.wer)} %` });
      for (let tick = 0; tick <= end + 1e-9; tick += step) {
        const line = make("span", { class: "tick" });
        line.style.left = at(tick);
        track.append(line);
      }
      if (score.wer_low !== null) {
        const whisker = make("span", { class: "whisker" });
        whisker.style.left = at(score.wer_low);
        whisker.style.width = at(score.wer_high - score.wer_low);
        track.append(whisker);
      }
      const dot = make("span", { class: i === baseline ? "dot hollow" : "dot" });
      dot.style.left = at(score.wer);
      track.append(dot);
      track.title = score.wer_low === null ? "" : `${rate(score.wer_low, 1)} to ${rate(score.wer_high, 1)} %`;
      const isBest = models.length > 1 && score.wer === best;
      const differs = i === baseline ? "baseline" : difference(score);
      return [
        make("span", { class: isBest ? "name best" : "name", text: names[i], title: names[i] }),
        track,
        make("span", { class: isBest ? "value best" : "value", text: rate(score.wer) }),
        make("span", { class: `difference ${verdict(score)}`, text: differs }),
      ];
    });
    const axis = make("span", { class: "axis" });
    for (let tick = 0; tick <= end + 1e-9; tick += step) {
      const label = make("span", { text: `${Number((100 * tick).toFixed(2))}` });
      label.style.left = at(tick);
      axis.append(label);
    }
    const first = scores[0];
    const dropped = first.dropped ? `, ${first.dropped} without a reference left out` : "";
    return make("figure", { data: { set: name } },
      make("figcaption", {},
        make("span", { text: group === "all" ? "all sets" : name }),
        make("span", { class: "hint", text: ` ${first.utterances} utterances, ${first.words} words${dropped}` })),
      make("div", { class: baseline < 0 ? "dots" : "dots differing" }, ...rows, make("span"), axis, make("span", { class: "hint", text: "%" })));
  };

  byId("level").textContent = `${Number((100 * data.confidence).toFixed(4))} %`;
  byId("differences-hint").hidden = baseline < 0;
  for (const place of document.querySelectorAll(".baseline-name")) place.textContent = data.baseline ?? "";
  byId("sets").append(...groupsOf("set").map((name) => panel("set", name)));
  if (several) byId("sets").append(panel("all", "all"));

  // --- all figures ------------------------------------------------------------------------------------------------

  const rowOf = (model, score, title) => [
    title, model.name, rate(score.wer), interval(score.wer_low, score.wer_high, rate), rate(score.cer),
    interval(score.cer_low, score.cer_high, rate), String(score.substitutions), String(score.deletions),
    String(score.insertions), String(score.words), ...(baseline < 0 ? [] : [difference(score)]),
  ];
  const level = byId("level").textContent;
  const head = ["set", "model", "WER", level, "CER", `${level} of CER`, "substituted", "deleted", "inserted", "words"];
  if (baseline >= 0) head.push(`against ${data.baseline}`);
  const titles = [...groupsOf("set").map((name) => ["set", name, name]), ...(several ? [["all", "all", "all sets"]] : [])];
  const rows = titles.flatMap(([group, name, title]) => models.map((model) => rowOf(model, scoreOf(model, group, name), title)));
  fill(byId("scores"), head, rows, head.map((_, i) => i).slice(2));

  // --- by domain and by speaker -----------------------------------------------------------------------------------

  const SHADES = ["#fdf6e6", "#f5c98e", "#dd8452", "#a8452f", "#5e1f22"];
  const dark = (share) => share > 0.55;
  const rates = (table, group, order) => {
    const members = order(groupsOf(group));
    const found = members.map((name) => models.map((model) => scoreOf(model, group, name)));
    const most = Math.max(0.01, ...found.flat().map((score) => Math.min(1, score.wer)));
    const top = make("tr", {}, make("th", { scope: "col", text: group }), make("th", { scope: "col", text: "words" }),
      ...names.map((name) => make("th", { scope: "col", text: name })));
    const body = make("tbody", {}, ...members.map((name, i) => make("tr", {},
      make("th", { scope: "row", text: name }),
      make("td", { class: "number", text: String(found[i][0].words) }),
      ...found[i].map((score) => {
        const share = Math.min(1, score.wer / most);
        const ends = interval(score.wer_low, score.wer_high, rate);
        const cell = make("td", { text: rate(score.wer, 1), title: ends ? `${ends} %` : "" });
        cell.style.background = blend(SHADES, share);
        cell.style.color = dark(share) ? "#ffffff" : "#1d2328";
        return cell;
      }))));
    table.append(make("thead", {}, top), body);
    return members.length;
  };
  const highest = (name) => Math.max(...models.map((model) => scoreOf(model, "speaker", name).wer));
  byId("domain-section").hidden = rates(byId("domains"), "domain", (members) => members) === 0;
  byId("speaker-section").hidden =
    rates(byId("speakers"), "speaker", (members) => members.sort((a, b) => highest(b) - highest(a)).slice(0, 200)) === 0;

  // --- alignments: one column for each word of the reference, and for what any model inserted ---------------------

  const columnsOf = (utterance, shown) => {
    const inserted = shown.map(() => [[]]); // before each word of the reference, by model
    const words = []; // of the reference: its text, and what each model has for it
    shown.forEach((model, row) => {
      let place = 0;
      for (const [kind, ours, theirs] of utterance.heard[model].pairs) {
        if (kind === "i") {
          inserted[row][place].push(theirs);
          continue;
        }
        words[place] ??= { text: ours, heard: [] };
        words[place].heard[row] = [kind, theirs];
        place += 1;
        inserted[row][place] ??= [];
      }
    });
    const columns = [];
    for (let place = 0; place <= words.length; place += 1) {
      const most = Math.max(...inserted.map((lists) => (lists[place] ?? []).length));
      for (let i = 0; i < most; i += 1) {
        columns.push({ text: "", heard: inserted.map((lists) => ((lists[place] ?? [])[i] === undefined ? null : ["i", lists[place][i]])) });
      }
      if (place < words.length) columns.push({ text: words[place].text, heard: shown.map((_, row) => words[place].heard[row] ?? null) });
    }
    return columns;
  };

  const CLASSES = { "=": "equal", s: "substitute", d: "delete", i: "insert" };
  const SAID = { s: "substituted: ", d: "deleted: ", i: "inserted: " };
  const wordCell = (entry, ours) => {
    if (entry === null) return make("td");
    const [kind, theirs] = entry;
    const tag = kind === "d" ? "del" : kind === "i" ? "ins" : "span";
    const title = kind === "s" ? `${ours} → ${theirs}` : "";
    return make("td", {}, make(tag, { class: `word ${CLASSES[kind]}`, text: kind === "d" ? ours : theirs, title, "aria-label": (SAID[kind] ?? "") + (theirs || ours) }));
  };
  // In letters: what stands around a word is as wide as two and a half, and the sign of an insertion as one more.
  const lettersOf = (entry, ours) => (entry ? (entry[1] || ours).length + (entry[0] === "i" ? 1.2 : 0) : 0);
  const widthOf = (column) => Math.max(column.text.length, ...column.heard.map((entry) => lettersOf(entry, column.text))) + 2.5;

  // Lines as wide as the page, each with the names at its left.
  const lines = (columns, room) => {
    const found = [[]];
    let used = 0;
    for (const column of columns) {
      const width = widthOf(column);
      if (used + width > room && found.at(-1).length) {
        found.push([]);
        used = 0;
      }
      found.at(-1).push(column);
      used += width;
    }
    return found;
  };
  const errorsText = ([s, d, i], words) => `${s + d + i} of ${words}`;
  const alignment = (utterance, shown, room) => {
    const blocks = lines(columnsOf(utterance, shown), room);
    return blocks.map((columns, block) => make("table", { class: "alignment" }, make("tbody", {},
      make("tr", { class: "reference" }, make("th", { scope: "row", text: "reference" }), make("td", { class: "errors", text: block ? "" : "errors" }),
        ...columns.map((column) => make("td", { text: column.text }))),
      ...shown.map((model, row) => make("tr", {},
        make("th", { scope: "row", text: names[model], title: names[model] }),
        make("td", { class: "errors", text: block ? "" : errorsText(utterance.heard[model].errors, utterance.words) }),
        ...columns.map((column) => wordCell(column.heard[row], column.text)))))));
  };

  // --- which utterances, in which order ---------------------------------------------------------------------------

  const errors = (utterance, model) => utterance.heard[model].errors.reduce((sum, count) => sum + count, 0);
  const orders = [];
  if (models.length > 1) orders.push(["most errors of any model", (u) => Math.max(...models.map((_, i) => errors(u, i)))]);
  models.forEach((_, i) => orders.push([`most errors of ${names[i]}`, (u) => errors(u, i)]));
  models.forEach((_, i) => {
    if (baseline < 0 || i === baseline) return;
    orders.push([`${names[i]} worse than ${data.baseline}`, (u) => errors(u, i) - errors(u, baseline), true]);
    orders.push([`${names[i]} better than ${data.baseline}`, (u) => errors(u, baseline) - errors(u, i), true]);
  });
  const option = (text, value) => make("option", { text, value });
  byId("order").append(...orders.map(([text], i) => option(text, i)));
  byId("set").append(option("all", ""), ...data.sets.map((set) => option(set.name, set.name)));
  byId("set-control").hidden = !several;
  byId("which").append(option("all", ""), ...names.map((name, i) => option(i === baseline || baseline < 0 ? name : `${name} and ${data.baseline}`, i)));
  byId("which-control").hidden = models.length < 2;

  const textOf = (utterance) => [
    utterance.id, utterance.set, utterance.speaker ?? "", utterance.domain ?? "",
    utterance.heard[0].pairs.map((pair) => pair[1]).join(" "),
    ...utterance.heard.map((heard) => heard.pairs.map((pair) => pair[2]).join(" ")),
  ].join("\n").toLowerCase();
  const texts = new Map(data.utterances.map((utterance) => [utterance, textOf(utterance)]));

  const PAGE = 20;
  let limit = PAGE;
  const draw = () => {
    const [, value, above] = orders[Number(byId("order").value)];
    const wanted = byId("filter").value.trim().toLowerCase();
    const set = byId("set").value;
    const which = byId("which").value;
    const shown = which === "" ? models.map((_, i) => i) : [...new Set(baseline < 0 ? [Number(which)] : [baseline, Number(which)])];
    const found = data.utterances
      .filter((utterance) => (set === "" || utterance.set === set) && texts.get(utterance).includes(wanted) && (!above || value(utterance) > 0))
      .sort((a, b) => value(b) - value(a));
    const letter = byId("probe").getBoundingClientRect().width / 20;
    const labels = Math.min(16, Math.max(9, ...shown.map((i) => names[i].length))) + 9;
    const room = Math.max(24, byId("utterances").clientWidth / letter - labels - 4);
    byId("utterances").replaceChildren(byId("probe"), ...found.slice(0, limit).map((utterance) => make("figure", { class: "utterance", data: { id: utterance.id } },
      make("figcaption", {}, make("span", { text: utterance.id }),
        make("span", { class: "hint", text: " " + [several ? utterance.set : null, utterance.speaker, utterance.domain].filter(Boolean).join(", ") })),
      ...alignment(utterance, shown, room),
      ...(shown.some((i) => utterance.heard[i].cut) ? [make("p", { class: "hint", text: "The rest is not shown." })] : []))));
    const all = data.utterances.length < data.scored ? `; the page holds the worst ${data.utterances.length} of ${data.scored}` : "";
    byId("count").textContent = `${found.length} utterance${found.length === 1 ? "" : "s"}${all}`;
    byId("more").hidden = found.length <= limit;
    byId("more").textContent = `Show ${Math.min(PAGE, found.length - limit)} more of ${found.length - limit}`;
  };
  if (data.utterances.length) {
    byId("worst-section").hidden = false;
    byId("utterances").append(make("span", { id: "probe", class: "alignment", "aria-hidden": "true", text: "abcdefghijklmnopqrst" }));
    const redraw = () => { limit = PAGE; draw(); };
    byId("controls").addEventListener("input", redraw);
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("more").addEventListener("click", () => { limit += PAGE; draw(); });
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
    draw();
  }

  // --- what stands still ------------------------------------------------------------------------------------------

  const origin = `${models.length} model${models.length === 1 ? "" : "s"}; texts normalised by ${data.normalizer}`;
  byId("summary").textContent = `${data.summary}.`;
  byId("origin").textContent = `${origin}${baseline < 0 ? "" : `; differences are from ${data.baseline}`}.`;
  document.title = `Word error rates of ${names.slice(0, 3).join(", ")}${names.length > 3 ? " and others" : ""}`;
  fill(byId("models"), ["model", "architecture", "given as", "digest"], models.map((model) => [model.name, model.architecture, model.given, model.digest.slice(0, 16)]));
  fill(byId("data-sets"), ["set", "utterances", "speech", "path", "digest"], data.sets.map((set) => [
    set.name, String(set.utterances), `${(set.audio_seconds / 60).toFixed(1)} minutes`, set.path, set.digest.slice(0, 16)]));
  fill(byId("parameters"), ["decoding", "value"], Object.entries(data.decoding).map(([name, value]) => [name, plain(value)]));
  byId("notes").append(...data.notes.map((text) => make("li", { text })));
  byId("notes-section").hidden = data.notes.length === 0;
})();
