// Back leads to the page before. A page that opens writes what it shows into its address, a parameter at a time, and
// Streamlit makes an entry of the history for each: Back would lead to the same page with fewer of them, which would write
// them again. So what only completes the address of a page that has just opened replaces the entry. So does what moves a
// replay, or lets it play: Back leads out of it.
const OPENING_MS = 15000;
const OF_REPLAY = ["replay", "play"];

function onlyMovesReplay(now, next) {
  const others = ({ searchParams }) => JSON.stringify([...searchParams].filter(([name]) => !OF_REPLAY.includes(name)).sort());
  return now.searchParams.has("replay") && next.searchParams.has("replay") && others(now) === others(next);
}

export default function () {
  if (window.rlvrHistory) return;
  window.rlvrHistory = true;
  const push = history.pushState.bind(history);
  let opened = 0;
  window.addEventListener("popstate", () => { opened = performance.now(); });
  history.pushState = (state, unused, url) => {
    const now = new URL(location.href), next = new URL(url ?? "", location.href);
    if (next.pathname !== now.pathname) opened = performance.now();
    else if (performance.now() - opened < OPENING_MS && [...now.searchParams].every(([name, value]) => next.searchParams.get(name) === value)) {
      return history.replaceState(state, unused, url);
    }
    if (next.pathname === now.pathname && onlyMovesReplay(now, next)) return history.replaceState(state, unused, url);
    return push(state, unused, url);
  };
}
