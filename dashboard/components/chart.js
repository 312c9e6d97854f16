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

function header(root, layout) {
  const title = layout.title ?? {};
  root.querySelector(".rlvr-title").textContent = title.text ?? "";
  root.querySelector(".rlvr-unit").textContent = title.subtitle?.text ?? "";
  const help = root.querySelector(".rlvr-help");
  help.title = layout.meta?.help ?? "";
  help.hidden = !help.title;
  delete layout.title;
  layout.margin.t = layout.showlegend ? 30 : 10; // the title stands in the page, not in the plot
}

function follow(plot, name) {
  if (!groups.has(name)) groups.set(name, new Set());
  groups.get(name).add(plot);
  plot.on("plotly_relayout", (change) => {
    if (plot.rlvrFollowing) return;
    const zoomed = "xaxis.range[0]" in change;
    if (!zoomed && !("xaxis.autorange" in change)) return;
    const update = zoomed
      ? { "xaxis.range": [change["xaxis.range[0]"], change["xaxis.range[1]"]] }
      : { "xaxis.autorange": true };
    for (const other of groups.get(name)) {
      if (other === plot) continue;
      if (!other.isConnected) { groups.get(name).delete(other); continue; }
      other.rlvrFollowing = true;
      window.Plotly.relayout(other, { ...update }).finally(() => { other.rlvrFollowing = false; });
    }
  });
}

function listen(plot, root) {
  plot.on("plotly_click", (event) => {
    const point = event.points?.[0];
    if (point && root.rlvrPick) root.rlvrPick(Math.round(point.x));
  });
}

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const root = parentElement.querySelector(".rlvr-chart");
  const plot = root.querySelector(".rlvr-plot");
  const spec = JSON.parse(data.figure);
  root.rlvrPick = data.pick ? (step) => setTriggerValue("pick", step) : null;
  header(root, spec.layout);
  plot.style.height = `${spec.layout.height}px`;
  plot.setAttribute("aria-label", root.querySelector(".rlvr-title").textContent);
  const config = {
    responsive: true, displaylogo: false, scrollZoom: false,
    modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };
  plotly().then((Plotly) => Plotly.react(plot, spec.data, spec.layout, config)).then(() => {
    if (plot.rlvrReady) return;
    plot.rlvrReady = true;
    if (data.group) follow(plot, data.group);
    listen(plot, root);
    plot.rlvrResize = new ResizeObserver(() => plot.offsetWidth && window.Plotly.Plots.resize(plot));
    plot.rlvrResize.observe(root);
  }).catch((error) => { plot.textContent = String(error.message ?? error); });
  return () => {
    plot.rlvrResize?.disconnect();
    if (data.group) groups.get(data.group)?.delete(plot);
    if (plot.rlvrReady) window.Plotly.purge(plot);
    plot.rlvrReady = false;
  };
}
