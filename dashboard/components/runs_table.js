// The table of all runs. Only the rows on the screen are in the page; text of runs is only ever set as textContent.
// Filter, grouping, order, ticks and open rows are kept in the URL, so that a copied address shows the same view.
const ROW = { wide: 54, narrow: 150 };
const NARROW = 860; // px of the table: below, a run is a card
const SPARE = 6; // rows drawn above and below the screen
const SEEDS = "seeds", NOTHING = "nothing";
const SEVERITIES = ["critical", "warning", "info"];
const COLUMNS = [ // id, title, help, what a row is sorted by, whether the best comes first
  ["run", "Run", "Task, weighting and seed below the name", (r) => r.name],
  ["status", "Status", "", (r) => r.status],
  ["verdict", "Verdict", "What the alert rules say, in short. Sorted by attention: runs that still train first, worst first; acknowledged alerts do not count", (r) => [r.rank, -(r.created ?? 0)]],
  ["alerts", "Alerts", "Alerts that fire now, by severity; acknowledged ones are called seen", (r) => r.firing.map((n) => -n).concat(-r.seen, -r.resolved)],
  ["entropy", "Entropy", "Share of the run's own baseline, the median of its first 20 steps after warm-up. Level: median of the last 5 steps. Every curve has the same scale from 0 to 100 %; the dashed line is the floor at 10 %", (r) => r.share],
  ["floor", "To floor", "Steps until the entropy is a tenth of its baseline, by the trend of the last 20 steps; only while a run trains and clearly falls", (r) => r.floor],
  ["reward", "Reward", "Median of the last 5 steps", (r) => r.reward, true],
  ["pass", "pass@1 / k", "Newest held-out evaluation", (r) => r.pass1, true],
  ["step", "Step", "Newest step, and when it came", (r) => r.step, true],
  ["age", "Age", "Time since the run was started", (r) => (r.created === null ? null : -r.created)],
];

function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "style") node.style.cssText = value;
    else if (name === "checked" || name === "indeterminate" || name === "value") node[name] = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

// --- the URL ---

// On the way to another page Streamlit first puts that page's parameters behind this page's path, and Back leads there.
function search() {
  const url = new URLSearchParams(location.search);
  const elsewhere = (url.has("run") || url.has("a")) && window.rlvrRunsSearch !== undefined;
  if (elsewhere) history.replaceState(history.state, "", location.pathname + window.rlvrRunsSearch);
  window.rlvrRunsSearch = location.search;
  return new URLSearchParams(location.search);
}

function readView() {
  const url = search();
  return {
    filter: url.get("filter") ?? "",
    group: url.get("group") || SEEDS,
    sort: (url.get("sort") ?? "verdict").replace(/^-/, ""),
    down: (url.get("sort") ?? "").startsWith("-"),
    ticked: new Set(url.getAll("tick")),
    open: new Set(url.getAll("open")),
  };
}

function writeView(view) {
  const url = new URLSearchParams();
  if (view.filter) url.set("filter", view.filter);
  if (view.group !== SEEDS) url.set("group", view.group);
  if (view.sort !== "verdict" || view.down) url.set("sort", (view.down ? "-" : "") + view.sort);
  for (const run of view.ticked) url.append("tick", run);
  for (const id of view.open) url.append("open", id);
  const text = url.toString();
  window.rlvrRunsSearch = text ? `?${text}` : "";
  history.replaceState(history.state, "", location.pathname + window.rlvrRunsSearch);
}

// --- rows: filter, group, sort ---

const mean = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};
const least = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? Math.min(...known) : null;
};
const most = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? Math.max(...known) : null;
};

function asItem(row) {
  return { ...row, id: `run:${row.run}`, name: row.run, sparks: [row], members: null };
}

function asGroup(id, name, about, members) {
  const worst = members.reduce((a, b) => (b.rank < a.rank ? b : a));
  const statuses = new Map();
  for (const member of members) statuses.set(member.status, (statuses.get(member.status) ?? 0) + 1);
  return {
    id, name, about, members, sparks: members,
    status: [...statuses.keys()].sort().join(" "), statuses,
    rank: worst.rank, health: worst.health, said: worst.said, sentence: worst.sentence, of: worst.run,
    firing: SEVERITIES.map((_, i) => members.reduce((n, one) => n + one.firing[i], 0)),
    seen: members.reduce((n, one) => n + one.seen, 0), resolved: members.reduce((n, one) => n + one.resolved, 0),
    share: mean(members.map((one) => one.share)), entropy: mean(members.map((one) => one.entropy)),
    floor: least(members.map((one) => one.floor)), reward: mean(members.map((one) => one.reward)),
    pass1: mean(members.map((one) => one.pass1)), passk: mean(members.map((one) => one.passk)), k: most(members.map((one) => one.k)),
    step: most(members.map((one) => one.step)), no_steps: worst.no_steps, planned: most(members.map((one) => one.planned)),
    last: most(members.map((one) => one.last)), created: most(members.map((one) => one.created)),
  };
}

function matches(item, words) {
  const text = `${item.name} ${item.about} ${item.comparison} ${item.status} ${item.health} ${item.said} ${item.value ?? ""}`.toLowerCase();
  return words.every((word) => text.includes(word));
}

function comparator(view) {
  const [, , , of, bestFirst] = COLUMNS.find(([id]) => id === view.sort) ?? COLUMNS[2];
  const flip = view.down ? -1 : 1;
  const compare = (a, b) => {
    if (Array.isArray(a)) {
      for (let i = 0; i < a.length; i++) { const d = compare(a[i], b[i]); if (d) return d; }
      return 0;
    }
    return typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
  };
  return (x, y) => {
    const [a, b] = [of(x), of(y)];
    if (a === null || a === undefined || b === null || b === undefined) { // what is not known comes last either way
      const d = (a === null || a === undefined) - (b === null || b === undefined);
      return d || x.name.localeCompare(y.name, undefined, { numeric: true });
    }
    return flip * (bestFirst ? -1 : 1) * compare(a, b) || x.name.localeCompare(y.name, undefined, { numeric: true });
  };
}

function lines(items, view) {
  const order = comparator(view);
  const words = view.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const kept = items.filter((item) => matches(item, words));
  const groups = new Map();
  const top = [];
  for (const item of kept) {
    const seeds = view.group === SEEDS;
    const name = seeds ? (item.comparison ? `${item.comparison} · ${item.weighting}` : "") : view.group === NOTHING ? "" : `${view.group} = ${item.value || "–"}`;
    if (!name) { top.push(item); continue; }
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(item);
  }
  for (const [name, members] of groups) {
    if (view.group === SEEDS && members.length < 2) { top.push(...members); continue; }
    members.sort(order);
    const seeds = members.map((one) => one.seed).sort((a, b) => a - b).join(", ");
    const about = view.group === SEEDS ? `${members.length} runs, seeds ${seeds}` : `${members.length} run${members.length > 1 ? "s" : ""}`;
    top.push(asGroup(`group:${name}`, name, about, members));
  }
  top.sort(order);
  const shown = [];
  for (const item of top) {
    shown.push({ item, level: 0 });
    if (item.members && view.open.has(item.id)) for (const member of item.members) shown.push({ item: member, level: 1 });
  }
  return { shown, kept };
}

// --- cells ---

function share(value) { return value === null ? "–" : `${Math.round(100 * value)} %`; }
function number(value) {
  if (value === null) return "–";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}
function ago(ts) {
  if (ts === null) return "";
  const seconds = Math.max(0, Date.now() / 1000 - ts);
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (seconds >= size) return `${Math.round(seconds / size)} ${unit}`;
  return `${Math.round(seconds)} s`;
}

const W = 104, H = 30, MOST_LINES = 16;
function sparkline(item, colours) {
  const known = item.sparks.filter((one) => one.spark.length > 1);
  if (!known.length) return null;
  const ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg");
  const label = `Entropy over steps, now ${share(item.share)} of its baseline`;
  for (const [name, value] of [["viewBox", `0 0 ${W} ${H}`], ["width", W], ["height", H], ["role", "img"], ["aria-label", label]]) svg.setAttribute(name, value);
  const y = (percent) => (2 + (H - 4) * (1 - Math.min(100, Math.max(0, percent)) / 100)).toFixed(1);
  const draw = (d, name, colour) => {
    const path = document.createElementNS(ns, "path");
    path.setAttribute("d", d);
    path.setAttribute("class", name);
    if (colour) path.setAttribute("stroke", colour);
    svg.append(path);
  };
  draw(`M0 ${y(0)}H${W}M0 ${y(100)}H${W}`, "rlvr-frame");
  draw(`M0 ${y(10)}H${W}`, "rlvr-floor");
  const step = Math.ceil(known.length / MOST_LINES); // of a large group every so many, as its rows are sorted
  for (const one of known.filter((_, i) => i % step === 0)) {
    const at = (i) => ((W - 2) * i / (one.spark.length - 1) + 1).toFixed(1);
    draw(`M${one.spark.map((percent, i) => `${at(i)} ${y(percent)}`).join("L")}`, known.length > 4 ? "rlvr-spark rlvr-thin" : "rlvr-spark", colours[one.weighting]);
  }
  return svg;
}

function chip(kind, text, title) { return h("span", { class: `rlvr-chip rlvr-${kind}`, title }, text); }

function statusCell(item) {
  if (item.statuses) return [...item.statuses].sort().map(([status, n]) => chip(status, `${n} ${status}`));
  return [chip(item.status, item.busy ? `${item.status}: ${item.busy}` : item.status, STATUS[item.status])];
}
const STATUS = {
  running: "Its process lives, and steps come or it says what else it does.",
  finished: "It ended as planned.",
  stopped: "Someone stopped it; all steps are written.",
  stalled: "The process lives, but no new step comes.",
  crashed: "Its process ended without closing the run.",
  failed: "It ended with an error: its events on the Run page say which.",
};
const ADVICE = { // what to do about a run that does not train as it should
  stalled: "No new step comes. Look at the trainer's output and at its machine.",
  crashed: "Its process is gone. rlvr train --resume goes on from the last checkpoint.",
  failed: "It ended with an error: see its events on the Run page.",
};

function verdictCell(item) {
  const health = item.health || "";
  const parts = [];
  if (health) parts.push(chip(health.replace(" ", "-"), health));
  const advice = !item.members && ADVICE[item.status];
  const text = [advice, health === "too early" ? "" : item.said].filter(Boolean).join(" ");
  const where = item.members && text ? ` (${item.of})` : "";
  parts.push(h("span", { class: "rlvr-said" }, text + where || (health ? "" : "–")));
  return parts;
}

function alertCell(item) {
  const parts = SEVERITIES.map((severity, i) => item.firing[i] && chip(severity, `${item.firing[i]} ${severity}`)).filter(Boolean);
  const rest = item.seen ? `${item.seen} seen` : item.resolved ? `${item.resolved} resolved` : "";
  if (rest && parts.length < 2) parts.push(h("span", { class: "rlvr-faint" }, rest));
  return parts.length ? parts : [h("span", { class: "rlvr-faint" }, "none")];
}

function floorText(item) {
  if (item.floor === null) return "–";
  return item.floor <= 0 ? "at floor" : `${number(Math.ceil(item.floor))} steps`;
}

function stepText(item) {
  if (item.step === null) return [item.no_steps];
  const of = item.planned ? ` of ${number(item.planned)}` : "";
  return [`${number(item.step)}${of}`, h("span", { class: "rlvr-faint rlvr-second" }, item.last ? `${ago(item.last)} ago` : "")];
}

// --- the table ---

class Table {
  constructor(root) {
    this.root = root;
    this.view = readView();
    this.rows = new Map(); // id -> {node, sign}
    this.focused = null;
    root.replaceChildren(this.bar(), this.scroll());
    new ResizeObserver(() => this.resize()).observe(root);
    new ResizeObserver(() => this.later()).observe(this.box); // it grows with its rows up to the screen
    window.addEventListener("rlvr-run-base", () => root.isConnected && this.update(this.data, this.send));
    this.clock = setInterval(() => (root.isConnected ? this.draw() : clearInterval(this.clock)), 5000);
  }

  bar() {
    this.filter = h("input", {
      type: "search", class: "rlvr-filter", placeholder: "Filter: name, task, weighting, status, verdict", "aria-label": "Filter runs",
      value: this.view.filter, oninput: () => this.change({ filter: this.filter.value }),
    });
    this.group = h("select", { "aria-label": "Group by", onchange: () => this.change({ group: this.group.value, open: new Set() }) });
    this.sorter = h("select", {
      "aria-label": "Sort by", onchange: () => this.change({ sort: this.sorter.value.replace(/^-/, ""), down: this.sorter.value.startsWith("-") }),
    });
    for (const [id, title] of COLUMNS) {
      this.sorter.append(h("option", { value: id }, id === "verdict" ? "attention" : title.toLowerCase()));
      this.sorter.append(h("option", { value: `-${id}` }, `${id === "verdict" ? "attention" : title.toLowerCase()}, reversed`));
    }
    this.count = h("span", { class: "rlvr-count", role: "status" });
    this.picked = h("span", { class: "rlvr-picked" });
    return h("div", { class: "rlvr-bar" }, this.filter,
      h("label", {}, "Group by ", this.group), h("label", { class: "rlvr-sorter" }, "Sort by ", this.sorter), this.count, this.picked);
  }

  scroll() {
    this.heads = new Map();
    const head = h("tr", { "aria-rowindex": "1" }, h("th", { class: "rlvr-c-tick", scope: "col" }, h("span", { class: "rlvr-hidden" }, "Tick")));
    for (const [id, title, help] of COLUMNS) {
      const mark = h("span", { class: "rlvr-order", "aria-hidden": "true" });
      const cell = h("th", { class: `rlvr-c-${id}`, scope: "col", title: help || null },
        h("button", { type: "button", onclick: () => this.change({ sort: id, down: this.view.sort === id && !this.view.down }) }, title, mark));
      this.heads.set(id, [cell, mark]);
      head.append(cell);
    }
    this.body = h("tbody");
    this.table = h("table", { "aria-label": "Runs" }, h("thead", {}, head), this.body);
    this.empty = h("p", { class: "rlvr-none", hidden: "" });
    this.box = h("div", { class: "rlvr-scroll", onscroll: () => this.later(), onkeydown: (event) => this.key(event) }, this.table, this.empty);
    this.box.addEventListener("focusin", (event) => { this.focused = event.target.closest("tr")?.dataset.id ?? null; });
    return this.box;
  }

  change(part) {
    const group = this.view.group;
    Object.assign(this.view, part);
    writeView(this.view);
    if (this.view.group !== group) this.ask();
    if ("filter" in part || "sort" in part || "group" in part) this.box.scrollTop = 0;
    this.compute();
  }

  ask() { // the rows hold the values of one option only
    const wanted = [SEEDS, NOTHING].includes(this.view.group) ? "" : this.view.group;
    if (wanted !== this.data.group && wanted !== this.asked) {
      this.asked = wanted;
      this.send.state("group", wanted);
    }
  }

  update(data, send) {
    if (!data) return;
    [this.data, this.send] = [data, send];
    const base = window.rlvrRunBases?.get(data.base);
    if (!base) return; // it comes in a moment, with an event
    if (data.group === this.asked) this.asked = null;
    this.items = Object.entries(base).map(([run, row]) => asItem(data.patch[run] ?? row));
    this.options();
    this.ask();
    this.root.classList.toggle("rlvr-dark", data.theme === "dark");
    this.compute();
  }

  options() {
    const keys = [SEEDS, NOTHING, ...this.data.keys];
    if (!keys.includes(this.view.group)) keys.push(this.view.group);
    if (this.keys === keys.join("\n")) return;
    this.keys = keys.join("\n");
    this.group.replaceChildren(...keys.map((key) => h("option", { value: key }, key === SEEDS ? "seeds of a comparison" : key)));
  }

  compute() {
    if (!this.items) return;
    const known = new Set(this.items.map((item) => item.run));
    for (const run of this.view.ticked) if (!known.has(run)) this.view.ticked.delete(run);
    const { shown, kept } = lines(this.items, this.view);
    [this.shown, this.kept] = [shown, kept];
    this.group.value = this.view.group;
    this.sorter.value = (this.view.down ? "-" : "") + this.view.sort;
    for (const [id, [cell, mark]] of this.heads) {
      const mine = this.view.sort === id;
      cell.setAttribute("aria-sort", mine ? (this.view.down ? "descending" : "ascending") : "none");
      mark.textContent = mine ? (this.view.down ? " ▴" : " ▾") : "";
    }
    this.count.textContent = kept.length === this.items.length ? `${kept.length} run${kept.length === 1 ? "" : "s"}` : `${kept.length} of ${this.items.length} runs`;
    this.empty.hidden = kept.length > 0;
    this.empty.textContent = kept.length ? "" : `No run matches “${this.view.filter}”. Every word must stand in its name, task, weighting, status or verdict.`;
    this.ticks();
    this.draw();
  }

  ticks() {
    const n = this.view.ticked.size;
    const sign = [...this.view.ticked].join("\n");
    if (this.tickSign === sign) return;
    this.tickSign = sign;
    const told = n === 1 ? "1 run ticked, tick another to compare" : `${n} runs ticked`;
    this.picked.replaceChildren(...(n ? [
      h("span", {}, told),
      h("button", { type: "button", class: "rlvr-go", disabled: n < 2 ? "" : null, onclick: () => this.send.trigger("compare", [...this.view.ticked]) }, "Compare"),
      h("button", { type: "button", onclick: () => this.change({ ticked: new Set() }) }, "Clear")] : []));
  }

  tick(item, on) {
    const ticked = new Set(this.view.ticked);
    for (const run of item.members ? item.members.map((one) => one.run) : [item.run]) on ? ticked.add(run) : ticked.delete(run);
    this.change({ ticked });
  }

  toggle(item) {
    const open = new Set(this.view.open);
    open.has(item.id) ? open.delete(item.id) : open.add(item.id);
    this.change({ open });
  }

  resize() {
    const narrow = this.root.clientWidth > 0 && this.root.clientWidth < NARROW;
    if (this.narrow === narrow) return;
    this.narrow = narrow;
    this.root.classList.toggle("rlvr-narrow", narrow);
    this.height = narrow ? ROW.narrow : ROW.wide;
    this.rows.clear();
    this.body.replaceChildren();
    this.draw();
  }

  later() {
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => { this.waits = false; this.draw(); });
  }

  draw() {
    if (!this.shown || !this.height) return;
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.height) - SPARE);
    const last = Math.min(this.shown.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / this.height) + SPARE);
    this.table.setAttribute("aria-rowcount", this.shown.length + 1);
    const nodes = [], drawn = new Map();
    const space = (rows) => rows && nodes.push(h("tr", { class: "rlvr-space", "aria-hidden": "true", style: `height:${rows * this.height}px` }));
    space(first);
    for (let at = first; at < last; at++) {
      const { item, level } = this.shown[at];
      const id = level ? `${item.id} in a group` : item.id;
      const sign = this.sign(item, level, at);
      const old = this.rows.get(id);
      const node = old?.sign === sign ? old.node : this.row(item, level, at);
      drawn.set(id, { node, sign });
      nodes.push(node);
    }
    space(this.shown.length - last);
    const held = this.body.contains(document.activeElement) ? document.activeElement.dataset.part : null;
    const keep = this.focused;
    const now = [...this.body.children];
    if (nodes.length !== now.length || nodes.some((node, i) => node !== now[i])) this.body.replaceChildren(...nodes);
    if (held && !this.body.contains(document.activeElement)) this.focus(keep, held);
    this.rows = drawn;
  }

  sign(item, level, at) {
    const ticked = (item.members ?? [item]).map((one) => this.view.ticked.has(one.run));
    return JSON.stringify([at, level, ticked, this.view.open.has(item.id), ago(item.last), ago(item.created), this.data.theme,
      item.name, item.about, item.status, item.busy, item.health, item.said, item.share, item.entropy, item.floor, item.reward, item.pass1, item.passk,
      item.k, item.step, item.no_steps, item.planned, item.firing, item.seen, item.resolved, item.sparks.map((one) => one.spark)]);
  }

  row(item, level, at) {
    const all = (item.members ?? [item]).map((one) => this.view.ticked.has(one.run));
    const box = h("input", {
      type: "checkbox", "aria-label": `Tick ${item.name}`, checked: all.every(Boolean), indeterminate: all.some(Boolean) && !all.every(Boolean),
      "data-part": "tick", onchange: (event) => this.tick(item, event.target.checked),
    });
    const open = this.view.open.has(item.id);
    const name = item.members
      ? h("button", { type: "button", class: "rlvr-name", "aria-expanded": String(open), title: item.name, "data-part": "name", onclick: () => this.toggle(item) },
        h("span", { class: "rlvr-fold", "aria-hidden": "true" }, open ? "▾" : "▸"), item.name)
      : h("a", { class: "rlvr-name", href: `run?run=${encodeURIComponent(item.run)}`, title: item.name, "data-part": "name", onclick: (event) => this.follow(event, item) }, item.name);
    const cell = (id, ...children) => h("td", { class: `rlvr-c-${id}` }, ...children);
    const passed = item.pass1 === null && item.passk === null ? "–" : `${share(item.pass1)} / ${share(item.passk)}`;
    const verdict = cell("verdict", ...verdictCell(item));
    if (item.sentence) verdict.title = item.sentence;
    const alerts = cell("alerts", ...alertCell(item));
    alerts.title = [...SEVERITIES.map((severity, i) => `${item.firing[i]} ${severity}`), `${item.seen} seen`, `${item.resolved} resolved`].join(", ");
    const entropy = cell("entropy", sparkline(item, this.data.colours), h("span", { class: "rlvr-value" }, item.share === null && item.entropy !== null ? `${number(item.entropy)} nats` : share(item.share)));
    entropy.title = item.entropy === null ? "No entropy was recorded" : item.share === null ? "Its baseline is not complete: that takes 20 steps after warm-up" : `${number(item.entropy)} nats, ${share(item.share)} of its baseline${item.members ? ", mean of the runs" : ""}`;
    const row = h("tr", { "aria-rowindex": at + 2, class: (level ? "rlvr-member" : item.members ? "rlvr-group" : "") + (all.every(Boolean) ? " rlvr-ticked" : ""), style: `height:${this.height}px` },
      cell("tick", h("label", {}, box)),
      cell("run", name, h("span", { class: "rlvr-faint rlvr-second" }, item.about)),
      cell("status", ...statusCell(item)), verdict, alerts, entropy,
      cell("floor", floorText(item)), cell("reward", number(item.reward)), cell("pass", passed), cell("step", ...stepText(item)), cell("age", ago(item.created) || "–"));
    row.dataset.id = level ? `${item.id} in a group` : item.id;
    row.addEventListener("click", (event) => {
      if (event.target.closest("a, button, input, label") || String(getSelection())) return;
      item.members ? this.toggle(item) : this.send.trigger("run", item.run);
    });
    return row;
  }

  follow(event, item) { // a plain click stays in this session; with Ctrl or the middle button it is a link like any other
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    this.send.trigger("run", item.run);
  }

  key(event) {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.focused) return;
    event.preventDefault();
    const ids = this.shown.map(({ item, level }) => (level ? `${item.id} in a group` : item.id));
    const at = Math.min(ids.length - 1, Math.max(0, ids.indexOf(this.focused) + moves[event.key]));
    const top = at * this.height, head = this.table.tHead.offsetHeight;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + this.height + head > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + this.height + head - this.box.clientHeight;
    this.draw();
    this.focus(ids[at], document.activeElement?.dataset.part ?? "name");
  }

  focus(id, part) {
    for (const row of this.body.children) if (row.dataset.id === id) row.querySelector(`[data-part=${part}]`)?.focus({ preventScroll: true });
  }
}

// This file comes with the rows that rarely change, because Streamlit sends an element that stayed the same as its hash
// alone. The table itself is a small element that calls `rlvrDrawRuns` with what changed.
window.rlvrDrawRuns = ({ data, parentElement, setTriggerValue, setStateValue }) => {
  const root = parentElement.querySelector(".rlvr-runs");
  root.rlvrTable ??= new Table(root);
  root.rlvrTable.update(data, { trigger: setTriggerValue, state: setStateValue });
};

export default function ({ data }) {
  const bases = (window.rlvrRunBases ??= new Map());
  if (!bases.has(data.id)) {
    bases.clear();
    bases.set(data.id, JSON.parse(data.rows));
  }
  window.dispatchEvent(new Event("rlvr-run-base"));
}
