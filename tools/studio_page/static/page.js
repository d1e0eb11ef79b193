// The tabs, and the start of the page.

import { setUpGeneration } from "./generation.js";
import { attempt, get } from "./request.js";
import { closeTraining, openTraining, setUpTraining } from "./training.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function select(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
  if (tab.id === "tab-train") openTraining();
  else closeTraining();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move === undefined) return;
    const next = tabs[(tabs.indexOf(tab) + move + tabs.length) % tabs.length];
    select(next);
    next.focus();
  });
}

attempt(async () => {
  const options = await get("/api/options");
  document.getElementById("model").textContent = options.model;
  setUpTraining(options, () => select(tabs[0]));
  setUpGeneration(options);
  document.body.dataset.ready = "true";
});
