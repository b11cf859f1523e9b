"use strict";
// Replaces the parts of the page that have changed, without a jump: the place, the
// keyboard's focus and a selected text stay.
(() => {
  const first = 2000, every = 5000, patience = 30000; // ms
  const byID = (id) => document.getElementById(id);
  const pause = byID("pause"), age = byID("age"), stale = byID("stale");
  let paused = false, last = Date.now(), timer;

  const selected = (part) => {
    const s = getSelection();
    return !s.isCollapsed && part.contains(s.anchorNode);
  };

  const replace = (fresh) => {
    document.title = fresh.title;
    const icon = document.querySelector("link[rel=icon]"), other = fresh.querySelector("link[rel=icon]");
    if (icon.href !== other.href) icon.replaceWith(other);
    document.body.dataset.state = fresh.body.dataset.state;
    for (const now of fresh.querySelectorAll("[data-live]")) {
      const old = byID(now.id);
      if (!old || selected(old) || (old.className === now.className && old.innerHTML === now.innerHTML)) continue;
      const links = [...old.querySelectorAll("a")], focus = links.indexOf(document.activeElement);
      old.className = now.className;
      old.replaceChildren(...now.childNodes);
      if (focus >= 0) old.querySelectorAll("a")[focus]?.focus({ preventScroll: true });
    }
  };

  const show = () => {
    age.textContent = paused ? "paused" : `${Math.round((Date.now() - last) / 1000)} s ago`;
  };

  const fail = (why) => {
    document.body.classList.add("stale");
    const text = `No answer since ${new Date(last).toISOString().slice(11, 19)} UTC: what is below is old. ${why}`;
    if (stale.textContent !== text) stale.textContent = text; // it is read aloud
    stale.hidden = false;
  };

  const refresh = async () => {
    try {
      const answer = await fetch(location.href, { signal: AbortSignal.timeout(patience) });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const text = await answer.text();
      if (paused) return;
      replace(new DOMParser().parseFromString(text, "text/html"));
      last = Date.now();
      document.body.classList.remove("stale");
      stale.hidden = true;
    } catch (error) {
      if (!paused) fail(`(${error.message})`);
    }
    show();
  };

  const plan = (after) => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      if (!document.hidden) await refresh();
      if (!paused) plan(every);
    }, after);
  };

  pause.onclick = () => {
    paused = !paused;
    pause.textContent = paused ? "Go on" : "Pause";
    show();
    if (paused) clearTimeout(timer);
    else plan(0);
  };
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && !paused) plan(0);
  });
  pause.hidden = age.hidden = false;
  setInterval(show, 1000);
  show();
  plan(first);
})();
