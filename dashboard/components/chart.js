// A Plotly chart that lives through updates: Plotly.react on the same node with uirevision keeps zoom and selection.
// Charts of one group share their x range. The server keeps it in the address, as FROM-TO (TO left out: the newest).
// The group "steps" stands over steps, others over what a run had spent.
// plotly.min.js is the copy of the Python wheel, served by this server.
const style = document.createElement("style");
style.textContent = __CSS__;
document.head.appendChild(style);
const SOURCE = "/app/static/plotly.min.js";
const DOUBLE_CLICK_MS = 300; // a click waits this long, because a double-click only zooms out
const VISIBLE_MS = 250;
const groups = (window.rlvrChartGroups ??= new Map());

function plotly() {
  if (window.Plotly) return Promise.resolve(window.Plotly);
  window.rlvrPlotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = SOURCE;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error(`${SOURCE} is not served: start the dashboard with "rlvr dashboard".`));
    document.head.appendChild(script);
  });
  return window.rlvrPlotly;
}

plotly(); // while the figures are on their way

// Charts are drawn one after the other, each on the screen before the next: a page of many would stay empty for long.
let turn = Promise.resolve();

function inTurn(job) {
  return (turn = turn.catch(() => {}).then(() => new Promise((next) => setTimeout(next))).then(job));
}

function header(root, data) {
  root.querySelector(".rlvr-title").textContent = data.title;
  root.querySelector(".rlvr-unit").textContent = data.unit;
  const help = root.querySelector(".rlvr-help");
  help.title = data.help;
  help.setAttribute("aria-label", data.help);
  help.hidden = !data.help;
}

// Only charts on the screen are drawn: the others keep their newest figure until they are scrolled to.
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.rlvrVisible = entry.isIntersecting;
    if (entry.isIntersecting) draw(entry.target);
  }
  clearTimeout(window.rlvrTelling);
  window.rlvrTelling = setTimeout(tellVisible, VISIBLE_MS);
}, { rootMargin: "150px" });

// The server builds sections anew at every step only while they are on the screen.
function tellVisible() {
  const shown = [...document.querySelectorAll(".rlvr-chart")].filter((root) => root.rlvrSection && root.rlvrVisible);
  const sections = [...new Set(shown.map((root) => root.rlvrSection))].sort().join("|");
  if (shown.length && sections !== shown[0].rlvrShown) shown[0].rlvrTell("visible", sections);
}

function draw(root) {
  const data = root.rlvrData, plot = root.querySelector(".rlvr-plot");
  if (!root.rlvrVisible || (data ? !take(root, plot, data) : !root.rlvrBehind)) return;
  root.rlvrBehind = false;
  const { told, spec } = plot.rlvrFigure;
  const figure = grown(spec, told.group);
  plot.rlvrConfig ??= configOf(plot); // always the same object: with another one Plotly would begin anew
  plotly().then((Plotly) => inTurn(() => Plotly.react(plot, figure.data, figure.layout, plot.rlvrConfig))).then(() => {
    if (!plot.rlvrReady) prepare(root, plot, told);
    const group = groups.get(told.group);
    if (group?.zoom && (group.zoom.to === null || !shows(plot, group.zoom))) zoom(plot, group.zoom, group.name);
    newer(root, plot, group);
  }).catch((error) => { plot.textContent = String(error.message ?? error); });
}

// Takes over the figure that the server sent last; false while its older points are on their way.
function take(root, plot, data) {
  const old = data.old_id ? window.rlvrOldPoints?.get(data.key) : null;
  if (data.old_id && old?.id !== data.old_id) return false;
  root.rlvrData = null;
  const spec = JSON.parse(data.figure);
  old?.traces.forEach((trace, i) => {
    for (const axis of Object.keys(trace)) spec.data[i][axis] = joined(numbers(trace[axis]), numbers(spec.data[i][axis]));
  });
  delete spec.layout.title; // it stands in the page, not in the plot
  spec.layout.margin.t = spec.layout.showlegend ? 30 : 10;
  plot.rlvrScalesY = spec.layout.yaxis?.range === undefined;
  plot.rlvrTold = { title: data.title, unit: data.unit, theme: data.theme };
  plot.rlvrFigure = { told: data, spec };
  return true;
}

// A figure with the newest points of its curves, those that came after it was made.
function grown({ data, layout }, group) {
  const traces = data.map(grownTrace);
  const shown = { ...structuredClone(layout), template: TEMPLATES[layout.meta.theme] };
  const limits = shown.xaxis?.autorangeoptions;
  if (limits?.clipmax !== undefined) {
    for (const trace of traces.filter((trace, i) => trace !== data[i])) {
      const last = trace.x[trace.x.length - 1];
      limits.clipmax = Math.max(limits.clipmax, last + room(group, last - limits.clipmin));
    }
  }
  return { data: traces, layout: shown };
}

function grownTrace(trace) {
  const points = window.rlvrNewPoints?.get(trace.meta?.live);
  if (!points) return trace;
  const [x, y] = [trace.x, trace.y].map((values) => (values.bdata === undefined ? values : numbers(values)));
  const [newX, newY] = points.map(numbers);
  const first = newX.findIndex((value) => value > x[x.length - 1]);
  if (first < 0) return trace;
  const { share } = trace.meta, added = newY.slice(first);
  for (let i = 0, last = y[y.length - 1]; i < added.length && share < 1; i++) {
    if (Number.isFinite(added[i])) last = Number.isFinite(last) ? last + share * (added[i] - last) : added[i];
    added[i] = last;
  }
  return { ...trace, x: joined(x, newX.slice(first)), y: joined(y, added) };
}

// The charts of the page that lack some of the newest points.
window.addEventListener("rlvr-new-points", () => {
  for (const root of document.querySelectorAll(".rlvr-chart")) {
    const figure = root.querySelector(".rlvr-plot").rlvrFigure;
    if (!figure?.spec.data.some((trace) => window.rlvrNewPoints.has(trace.meta?.live))) continue;
    root.rlvrBehind = true;
    draw(root);
  }
});

function configOf(plot) {
  return {
    responsive: true, displaylogo: false, scrollZoom: false,
    modeBarButtonsToRemove: ["toImage", "sendChartToCloud", "select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    modeBarButtonsToAdd: ["PNG", "SVG"].map((kind) => ({ name: `Save as ${kind}`, icon: saveIcon(kind), click: () => save(plot, kind.toLowerCase()) })),
  };
}

const ICONS = { // an arrow into a tray, with a dot for PNG and a curve for SVG
  PNG: "M11 2h2v9h3l-4 4-4-4h3zM4 18h2v2h12v-2h2v4H4zM11 16h2v1h-2z",
  SVG: "M11 2h2v9h3l-4 4-4-4h3zM4 18h2v2h12v-2h2v4H4zM2 8q4-6 6 0l-1 0q-2-4-4 0z",
};

function saveIcon(kind) {
  return { width: 24, height: 24, path: ICONS[kind] };
}

// The picture has the title, and the background of the page, which the chart itself leaves to the page.
function save(plot, format) {
  const { title: name, unit, theme } = plot.rlvrTold;
  const { paper } = TEMPLATES[theme].layout.meta;
  const title = { text: unit ? `${name}, ${unit}` : name, x: 0.02, xanchor: "left", font: { size: 15 } };
  const margin = { ...plot.layout.margin, t: (plot.layout.margin?.t ?? 30) + 36 };
  const layout = { ...plot.layout, title, margin, paper_bgcolor: paper, plot_bgcolor: paper };
  const filename = name.toLowerCase().replace(/[^a-z0-9@]+/g, "-");
  const size = { width: plot.offsetWidth, height: plot.offsetHeight + 36, scale: format === "png" ? 2 : 1 };
  return window.Plotly.downloadImage({ data: plot.data, layout }, { format, filename, ...size });
}

const NUMBERS = { f4: Float32Array, f8: Float64Array, i4: Int32Array, i2: Int16Array, i1: Int8Array };

function numbers({ dtype, bdata }) {
  const bytes = Uint8Array.from(atob(bdata), (character) => character.charCodeAt(0));
  return new NUMBERS[dtype](bytes.buffer);
}

function joined(first, second) {
  const all = new first.constructor(first.length + second.length);
  all.set(first);
  all.set(second, first.length);
  return all;
}

function prepare(root, plot, data) {
  plot.rlvrReady = true;
  if (data.group) follow(plot, data.group);
  plot.on("plotly_click", (event) => {
    const cell = root.rlvrCells ? cellOf(event.points ?? []) : null;
    const step = cell?.step ?? (root.rlvrGroup ? event.points?.[0]?.x : undefined);
    if (step === undefined || !root.rlvrMenu) return;
    clearTimeout(plot.rlvrClick);
    const x = [undefined, "", "steps"].includes(root.rlvrGroup) ? Math.round(step) : step;
    plot.rlvrClick = setTimeout(() => openMenu(root, x, cell, event.event), DOUBLE_CLICK_MS);
  });
  plot.on("plotly_doubleclick", () => clearTimeout(plot.rlvrClick));
  plot.rlvrResize = new ResizeObserver(() => plot.offsetWidth && window.Plotly.Plots.resize(plot));
  plot.rlvrResize.observe(root);
}

// ---- zoom: one range of steps for all charts of a group ----

function fromText(text) {
  const found = /^(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)?$/.exec(text);
  return found ? { from: Number(found[1]), to: found[2] === undefined ? null : Number(found[2]) } : null;
}

function toText(range, name) {
  if (!range) return "";
  const rounded = (x) => (name === "steps" ? Math.round(x) : Number(x.toPrecision(5)));
  return `${Math.max(0, rounded(range.from))}-${range.to === null ? "" : rounded(range.to)}`;
}

// How far the axis goes beyond the newest point.
const room = (name, width) => (name === "steps" ? 0.5 : 0) + 0.01 * width;

// Takes over the zoom of the address as soon as the server tells it. Charts are drawn later, and in any order: one that
// went by what it was told itself could bring an older address back.
function heed({ group: name, zoom: text }) {
  if (!name) return;
  if (!groups.has(name)) groups.set(name, { name, plots: new Set() });
  const group = groups.get(name);
  for (const old of group.plots) if (!old.isConnected) group.plots.delete(old);
  if (!group.plots.size) Object.assign(group, { zoom: null, told: "", chosen: "" }); // a new page begins unzoomed
  if (text === group.told) return;
  group.told = text;
  if (text === group.chosen) return; // the reader's own zoom comes back
  group.chosen = text;
  zoomAll(group, fromText(text));
}

function follow(plot, name) {
  const group = groups.get(name);
  group.plots.add(plot);
  plot.on("plotly_relayout", (change) => {
    if (plot.rlvrFollowing) return;
    const zoomed = "xaxis.range[0]" in change;
    if (!zoomed && !("xaxis.autorange" in change)) return;
    const [from, to] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    choose(plot, group, zoomed ? { from, to } : null, "yaxis.range[0]" in change ? plot : null);
  });
}

// The reader's own zoom: at once on the screen, then into the address.
function choose(plot, group, range, except = null) {
  group.chosen = toText(range, group.name);
  zoomAll(group, range, except);
  plot.closest(".rlvr-chart").rlvrTell("zoom", group.chosen);
}

function zoomAll(group, range, except = null) {
  group.zoom = range;
  for (const plot of group.plots) {
    if (!plot.isConnected) continue;
    if (plot !== except) zoom(plot, range, group.name);
    newer(plot.closest(".rlvr-chart"), plot, group);
  }
}

function zoom(plot, range, name) {
  if (!plot._fullLayout) return;
  const update = { "xaxis.autorange": true };
  if (plot.rlvrScalesY) update["yaxis.autorange"] = true;
  if (range) {
    const newest = newestStep(plot);
    const shown = [range.from, range.to ?? newest + room(name, newest - range.from)];
    delete update["xaxis.autorange"];
    update["xaxis.range"] = shown;
    const heights = plot.rlvrScalesY ? heightsWithin(plot, shown) : null;
    if (heights) {
      delete update["yaxis.autorange"];
      update["yaxis.range"] = heights;
    }
  }
  plot.rlvrFollowing = true;
  window.Plotly.relayout(plot, update).finally(() => { plot.rlvrFollowing = false; });
}

function shows(plot, range) {
  const [from, to] = plot._fullLayout.xaxis.range;
  return from === range.from && to === range.to;
}

const lines = (plot) => plot._fullData.filter((trace) => trace.visible === true && (trace.yaxis ?? "y") === "y");

function heightsWithin(plot, [from, to]) {
  if (lines(plot).some((trace) => trace.type !== "scatter")) return null;
  const axis = plot._fullLayout.yaxis, log = axis.type === "log";
  let low = Infinity, high = -Infinity;
  for (const { x, y } of lines(plot)) {
    for (let i = 0; i < x.length; i++) {
      const value = log ? Math.log10(y[i]) : y[i];
      if (x[i] < from || x[i] > to || y[i] === null || !Number.isFinite(value)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  if (low > high) return null;
  const room = 0.06 * (high - low) || 0.05 * Math.abs(high) || 0.05;
  const grounded = !log && axis.rangemode === "tozero" && low >= 0;
  return [grounded ? 0 : low - room, high + room];
}

function newestStep(plot) {
  let newest = -Infinity;
  for (const { x } of lines(plot)) if (x?.length) newest = Math.max(newest, Number(x[x.length - 1]));
  return newest;
}

// A zoomed chart says that newer steps are to the right of it.
function newer(root, plot, group) {
  const button = root.querySelector(".rlvr-newer"), to = group?.zoom?.to ?? null;
  const hidden = to === null || !plot._fullData || newestStep(plot) <= to + (group.name === "steps" ? 1 : 0.01 * (to - group.zoom.from));
  button.hidden = hidden;
  if (!hidden) {
    button.textContent = `newest ${placeText(newestStep(plot), group.name, plot)} is off screen: show it`;
    button.onclick = () => choose(plot, group, { from: group.zoom.from, to: null });
  }
}

// "step 17", "1.2M response tokens"
function placeText(x, name, plot) {
  if (!name || name === "steps") return `step ${Math.floor(x)}`;
  return `${x.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 })} ${plot.layout.xaxis.title.text}`;
}

// ---- the menu of a clicked step, or of a clicked cell of a histogram ----

function cellOf(points) {
  const point = points[points.length - 1]; // of two curves the newer one
  if (!point) return null;
  if (point.fullData.type === "heatmap") return { step: point.x, number: point.pointNumber[0] };
  const step = point.fullData.meta?.step;
  return step === undefined ? null : { step, number: point.pointNumber };
}

function openMenu(root, step, cell, event) {
  closeMenu();
  const menu = document.createElement("div");
  menu.className = "rlvr-menu";
  menu.setAttribute("role", "menu");
  const plot = root.querySelector(".rlvr-plot");
  const place = placeText(step, root.rlvrGroup, plot);
  menu.setAttribute("aria-label", place[0].toUpperCase() + place.slice(1));
  const title = document.createElement("b");
  title.textContent = menu.getAttribute("aria-label");
  menu.append(title);
  const choices = {};
  if (cell) choices["Read the tokens of this cell"] = () => root.rlvrTell("cell", `${step}:${root.rlvrCells}:${cell.number}`);
  choices[cell ? "Read all its tokens" : "Read its tokens"] = () => root.rlvrTell("tokens", String(step));
  if (root.rlvrGroup) {
    choices["Pin its distribution"] = () => root.rlvrTell("pin", String(step));
    choices["Show from here on"] = () => choose(plot, groups.get(root.rlvrGroup), { from: step, to: null });
  }
  for (const [text, act] of Object.entries(choices)) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("role", "menuitem");
    button.textContent = text;
    button.onclick = () => { closeMenu(); act(); };
    menu.append(button);
  }
  root.append(menu);
  const box = root.getBoundingClientRect();
  const [x, y] = event ? [event.clientX - box.left, event.clientY - box.top] : [box.width / 2, box.height / 2];
  menu.style.left = `${Math.max(0, Math.min(x + 8, box.width - menu.offsetWidth - 4))}px`;
  menu.style.top = `${y + 8}px`;
  menu.querySelector("button").focus({ preventScroll: true });
}

function closeMenu() {
  document.querySelectorAll(".rlvr-menu").forEach((menu) => menu.remove());
}

if (!window.rlvrClosesMenus) {
  window.rlvrClosesMenus = true;
  document.addEventListener("keydown", (event) => event.key === "Escape" && closeMenu());
  document.addEventListener("pointerdown", (event) => event.target.closest(".rlvr-menu") || closeMenu());
}

window.rlvrChart = function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const root = parentElement.querySelector(".rlvr-chart");
  const plot = root.querySelector(".rlvr-plot");
  root.rlvrMenu = data.menu;
  root.rlvrCells = data.cells;
  root.rlvrSection = data.section;
  root.rlvrShown = data.shown;
  root.rlvrTell = (what, value) => setTriggerValue("pick", { what, value });
  root.rlvrGroup = data.group;
  root.rlvrData = data;
  heed(data);
  header(root, data);
  plot.style.height = `${data.height}px`;
  plot.setAttribute("aria-label", data.title);
  watcher.observe(root);
  draw(root);
  const redraw = () => draw(root);
  window.addEventListener("rlvr-old-points", redraw);
  return () => {
    window.removeEventListener("rlvr-old-points", redraw);
    watcher.unobserve(root);
    plot.rlvrResize?.disconnect();
    groups.get(data.group)?.plots.delete(plot);
    if (plot.rlvrReady) window.Plotly.purge(plot);
    plot.rlvrReady = false;
  };
};
