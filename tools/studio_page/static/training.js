// The part that trains: a form, the list of trainings, and the one that is looked at.

import { lossChart, short } from "./chart.js";
import { addLora, showLoras } from "./generation.js";
import { attempt, element, field, fileAddress, get, picture, post, setValue, showFault, valuesOf } from "./request.js";

const form = document.getElementById("training");
const box = document.getElementById("run");
let settings = [];
let chosen = null;
let timer = null;
let showGeneration = () => {};

export function setUpTraining(options, show) {
  showGeneration = show;
  settings = options.train_fields.map((setting) => ({ ...setting, default: null, optional: true }));
  const numbers = settings.filter((setting) => setting.kind !== "lines");
  const lines = settings.filter((setting) => setting.kind === "lines");
  const pairs = element("div", { class: "pair" }, ...numbers.map((setting) => field(setting, "train")));
  document.getElementById("train-fields").append(pairs, ...lines.map((setting) => field(setting, "train")));
  document.getElementById("run-data").append(...options.data.map((name) => element("option", { value: name }, name)));
  const recipes = document.getElementById("run-recipe");
  recipes.append(...options.recipes.map((recipe) => element("option", { value: recipe.name }, recipe.name)));
  const usual = options.recipes.find((recipe) => recipe.name.startsWith("lora")) ?? options.recipes[0];
  if (usual) recipes.value = usual.name;
  const showRecipe = () => {
    const values = options.recipes.find((recipe) => recipe.name === recipes.value)?.values ?? {};
    for (const setting of settings) {
      const value = values[setting.name] ?? options.train_fields.find((other) => other.name === setting.name).default;
      form.elements[setting.name].placeholder = value === null ? "" : String(value);
    }
  };
  recipes.addEventListener("change", showRecipe);
  showRecipe();
  setValue(form.elements.seed, null);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(start);
  });
}

export function openTraining() {
  attempt(look);
}

export function closeTraining() {
  clearTimeout(timer);
}

async function start() {
  const name = document.getElementById("run-name").value;
  const content = {
    name, data: document.getElementById("run-data").value, recipe: document.getElementById("run-recipe").value,
    settings: valuesOf(form, settings),
  };
  await post("/api/runs", content);
  chosen = name;
  await look();
}

// Ask for the list and for the chosen training, again and again while one is running.
async function look() {
  clearTimeout(timer);
  const runs = await get("/api/runs");
  chosen ??= runs[0]?.name ?? null;
  const list = document.getElementById("runs");
  if (!runs.length) list.replaceChildren(element("p", { class: "empty" }, "None yet."));
  else list.replaceChildren(...runs.map(runLine));
  if (chosen !== null) draw(await get(`/api/runs/${encodeURIComponent(chosen)}`));
  if (runs.some((run) => run.state === "running")) timer = setTimeout(() => look().catch(showFault), 1000);
}

function stateOf(run) {
  const steps = run.total === null ? `step ${run.step}` : `step ${run.step} of ${run.total}`;
  if (run.state === "running" && run.step === 0) return "running: reading the images and compiling";
  return run.state === "finished" ? `finished, ${run.step} steps` : `${run.state}, ${steps}`;
}

function runLine(run) {
  const choose = () => attempt(async () => {
    chosen = run.name;
    await look();
  });
  return element("button", { type: "button", class: "run", "aria-pressed": String(run.name === chosen), onclick: choose },
    element("span", {}, run.name), element("span", { class: "state" }, stateOf(run)));
}

function draw(run) {
  const console = box.querySelector("details");
  const isOpen = console !== null && console.open;
  const act = (action) => () => attempt(async () => {
    await post(`/api/runs/${encodeURIComponent(run.name)}/${action}`, {});
    await look();
  });
  const actions = element("div", { class: "actions" });
  if (run.state === "running") actions.append(element("button", { type: "button", id: "stop", onclick: act("stop") }, "Stop"));
  if (run.can_resume) actions.append(element("button", { type: "button", id: "resume", onclick: act("resume") }, "Resume"));
  const lora = run.files.find((file) => file.endsWith("lora.ckpt"));
  if (lora) {
    const use = () => attempt(async () => {
      showLoras(await get("/api/loras"));
      addLora(lora);
      showGeneration();
    });
    actions.append(element("button", { type: "button", id: "use-lora", onclick: use }, "Use this LoRA"));
  }
  const links = element("p", { class: "legend" });
  for (const file of run.files) links.append(element("a", { href: fileAddress(file), download: true }, `download ${file.split("/").pop()}`), " ");
  if (run.report) links.append(element("a", { href: fileAddress(run.report), target: "_blank", rel: "noopener" }, "full report"));
  const parts = [element("h2", {}, run.name), element("p", { class: "legend" }, stateOf(run))];
  if (run.total) parts.push(element("progress", { max: run.total, value: run.step, "aria-label": `steps of ${run.name}` }));
  if (run.error) parts.push(element("p", { class: "bad" }, run.error));
  parts.push(actions);
  if (run.curve.step.length > 1 && run.curve.mean.some((value) => value !== null)) {
    const mean = short(run.curve.mean[run.curve.mean.length - 1]);
    parts.push(element("h3", {}, "Loss"), lossChart(run.curve), element("p", { class: "legend" }, `thin: each step; thick: running mean, ${mean} now`));
  }
  if (run.strips.length) parts.push(element("h3", {}, "Samples"));
  for (const strip of run.strips) {
    const frames = strip.frames.map((frame) => element("li", {},
      picture(frame.file, `${strip.prompt}, step ${frame.step}`), element("span", {}, frame.step ? `step ${frame.step}` : "before")));
    parts.push(element("p", { class: "legend" }, strip.prompt), element("ul", { class: "strip" }, ...frames));
  }
  parts.push(links);
  if (run.console) {
    parts.push(element("details", { open: isOpen || run.state === "failed" }, element("summary", {}, "What the run prints"), element("pre", { tabindex: 0 }, run.console)));
  }
  const focused = document.activeElement?.id;
  box.replaceChildren(...parts);
  box.hidden = false;
  if (focused && ["stop", "resume", "use-lora"].includes(focused)) document.getElementById(focused)?.focus();
}
