// A Plotly chart that lives through updates: Plotly.react on the same node with uirevision keeps zoom and selection.
// Charts of one group share their x range. plotly.min.js is the copy of the Python wheel, served by this server.
const SOURCE = "/app/static/plotly.min.js";
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

function header(root, data) {
  root.querySelector(".rlvr-title").textContent = data.title;
  root.querySelector(".rlvr-unit").textContent = data.unit;
  const help = root.querySelector(".rlvr-help");
  help.title = data.help;
  help.hidden = !data.help;
}

// Only charts on the screen are drawn: the others keep their newest figure until they are scrolled to.
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.rlvrVisible = entry.isIntersecting;
    if (entry.isIntersecting) draw(entry.target);
  }
}, { rootMargin: "150px" });

function draw(root) {
  const data = root.rlvrData;
  if (!data || !root.rlvrVisible) return;
  root.rlvrData = null;
  const plot = root.querySelector(".rlvr-plot");
  const spec = JSON.parse(data.figure);
  delete spec.layout.title; // it stands in the page, not in the plot
  spec.layout.margin.t = spec.layout.showlegend ? 30 : 10;
  const config = {
    responsive: true, displaylogo: false, scrollZoom: false,
    modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };
  plotly().then((Plotly) => Plotly.react(plot, spec.data, spec.layout, config)).then(() => {
    if (plot.rlvrReady) return;
    plot.rlvrReady = true;
    if (data.group) follow(plot, data.group);
    plot.on("plotly_click", (event) => {
      const point = event.points?.[0];
      if (point && root.rlvrPick) root.rlvrPick(Math.round(point.x));
    });
    plot.rlvrResize = new ResizeObserver(() => plot.offsetWidth && window.Plotly.Plots.resize(plot));
    plot.rlvrResize.observe(root);
  }).catch((error) => { plot.textContent = String(error.message ?? error); });
}

function follow(plot, name) {
  if (!groups.has(name)) groups.set(name, { plots: new Set(), update: null });
  const group = groups.get(name);
  for (const old of group.plots) if (!old.isConnected) group.plots.delete(old);
  if (!group.plots.size) group.update = null; // a new page begins unzoomed
  group.plots.add(plot);
  if (group.update) zoom(plot, group.update); // the others were zoomed before this one was drawn
  plot.on("plotly_relayout", (change) => {
    if (plot.rlvrFollowing) return;
    const zoomed = "xaxis.range[0]" in change;
    if (!zoomed && !("xaxis.autorange" in change)) return;
    const range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    group.update = zoomed ? { "xaxis.range": range } : null;
    for (const other of group.plots) {
      if (other !== plot && other.isConnected) zoom(other, group.update ?? { "xaxis.autorange": true });
    }
  });
}

function zoom(plot, update) {
  plot.rlvrFollowing = true;
  window.Plotly.relayout(plot, { ...update }).finally(() => { plot.rlvrFollowing = false; });
}

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const root = parentElement.querySelector(".rlvr-chart");
  const plot = root.querySelector(".rlvr-plot");
  root.rlvrPick = data.pick ? (step) => setTriggerValue("pick", step) : null;
  root.rlvrData = data;
  header(root, data);
  plot.style.height = `${data.height}px`;
  plot.setAttribute("aria-label", data.title);
  watcher.observe(root);
  draw(root);
  return () => {
    watcher.unobserve(root);
    plot.rlvrResize?.disconnect();
    groups.get(data.group)?.plots.delete(plot);
    if (plot.rlvrReady) window.Plotly.purge(plot);
    plot.rlvrReady = false;
  };
}
