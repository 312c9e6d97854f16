// Tokens that were looked for, each in its context on one line. A click opens its rollout.
function part(tag, name, text) {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text.replace(/[\n\t\r]/g, (mark) => ({ "\n": "⏎", "\t": "⇥", "\r": "␍" })[mark]);
  return node;
}

export default function ({ data, parentElement, setTriggerValue }) {
  const box = parentElement.querySelector(".rlvr-found");
  const rows = data.rows.map(({ sample, position, where, before, text, after, value }) => {
    const row = document.createElement("button");
    row.type = "button";
    const left = part("span", "rlvr-code rlvr-before", "");
    left.append(part("bdi", "", before));
    row.append(part("span", "rlvr-where", where), left, part("b", "", text || "∅"), part("span", "rlvr-code", after), part("span", "rlvr-number", value));
    row.addEventListener("click", () => setTriggerValue("open", { sample, position }));
    return row;
  });
  box.replaceChildren(...rows);
}
