// Keeps the newest points of curves for chart.js: {name of the curve: [x, y]}, and says when there are others.
export default function ({ data }) {
  if (window.rlvrNewPointsText === data.points) return;
  window.rlvrNewPointsText = data.points;
  const { x, curves } = JSON.parse(data.points);
  window.rlvrNewPoints = new Map(Object.entries(curves).map(([name, [place, y]]) => [name, [x[place], y]]));
  window.dispatchEvent(new Event("rlvr-new-points"));
}
