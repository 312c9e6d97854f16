// Holds the rows of the runs table as they once were; the table draws them with what changed since.
export default function ({ data }) {
  const bases = (window.rlvrRunBases ??= new Map());
  if (!bases.has(data.id)) {
    bases.clear();
    bases.set(data.id, JSON.parse(data.rows));
  }
  window.dispatchEvent(new Event("rlvr-run-base"));
}
