// The part that makes images: settings, LoRAs, the queue and the gallery.

import { attempt, element, field, get, picture, post, setValue, showFault, valuesOf } from "./request.js";
import { begin, leaveOut, setUpSource, sourceOf } from "./source.js";

const form = document.getElementById("request");
const loraBox = document.getElementById("loras");
const loraList = document.getElementById("lora");
const gallery = document.getElementById("gallery");
// The settings that are always shown, of those that there are. The others are folded, by group.
const FIRST = ["prompt", "negative_prompt", "sampler", "schedule", "sampling_steps", "scale", "seed", "n_samples", "H", "W"];

// How many images are made is not written into each.
const UNWRITTEN = ["n_iter", "n_samples"];
// Files that an image may be made from and that the page does not find again.
const FILES = ["init_image", "mask_image", "init_latents", "unet_checkpoint", "vae_checkpoint", "textual_inversion"];
// What the page does not say of a LoRA.
const LORA_PARTS = ["text_encoder_weight", "block_weights", "start", "end", "lora_ft_unet", "lora_ft_text_encoder"];

let settings = [];
let chosen = [];
let jobs = [];
let timer = null;
let hasSource = false;

export function setUpGeneration(options) {
  settings = options.fields;
  const byName = new Map(settings.map((setting) => [setting.name, setting]));
  const first = FIRST.filter((name) => byName.has(name)).map((name) => byName.get(name));
  const box = document.getElementById("fields-first");
  let pair = null;
  for (const setting of first) {
    const made = field(setting, "image");
    if (setting.kind === "text") box.append(made);
    else {
      if (pair === null || pair.children.length === 2) box.append(pair = element("div", { class: "pair" }));
      pair.append(made);
    }
  }
  const groups = new Map();
  for (const setting of settings) {
    if (FIRST.includes(setting.name)) continue;
    if (!groups.has(setting.group)) groups.set(setting.group, element("details", {}, element("summary", {}, `More: ${setting.group || "images"}`)));
    groups.get(setting.group).append(field(setting, "image"));
  }
  document.getElementById("fields-more").append(...groups.values());
  form.elements.prompt.required = true;
  for (const [name, side] of [["H", "height"], ["W", "width"]]) {
    if (form.elements[name]) form.elements[name].placeholder = `${options.image_size} (${side})`;
  }
  showLoras(options.loras);
  hasSource = options.source;
  if (hasSource) setUpSource();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(generate);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.ctrlKey) form.requestSubmit();
  });
  document.getElementById("add-lora").addEventListener("click", () => addLora(loraList.value));
  document.getElementById("more").addEventListener("click", () => attempt(() => loadGallery(true)));
  attempt(async () => {
    await loadGallery();
    await look();
  });
}

export function showLoras(names) {
  const before = loraList.value;
  loraList.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  if (names.includes(before)) loraList.value = before;
  if (!names.length) loraList.append(element("option", { value: "" }, "there is none yet"));
  document.getElementById("add-lora").disabled = !names.length;
}

export function addLora(name, strength = 1) {
  if (!name || chosen.some((lora) => lora.name === name)) return;
  chosen.push({ name, strength });
  drawLoras();
}

function drawLoras() {
  loraBox.replaceChildren(...chosen.map((lora, place) => {
    const id = `strength-${place}`;
    const slider = element("input", { type: "range", id, min: -1, max: 2, step: 0.05, value: lora.strength });
    const number = element("input", { type: "number", min: -1000, max: 1000, step: "any", value: lora.strength, "aria-label": `strength of ${lora.name}` });
    const follow = (from, to) => from.addEventListener("input", () => {
      lora.strength = Number(from.value);
      to.value = from.value;
    });
    follow(slider, number);
    follow(number, slider);
    const remove = element("button", { type: "button", class: "small", "aria-label": `remove ${lora.name}`, onclick: () => {
      chosen = chosen.filter((other) => other !== lora);
      drawLoras();
    } }, "×");
    return element("div", { class: "lora" }, element("label", { for: id }, lora.name), number, remove, slider);
  }));
}

async function generate() {
  const loras = chosen.map(({ name, strength }) => ({ name, strength }));
  await post("/api/jobs", { settings: valuesOf(form, settings), loras, ...await sourceOf() });
  await look();
}

// Ask how far the queue is, again and again while something is in it.
async function look() {
  clearTimeout(timer);
  const before = jobs;
  jobs = await get("/api/jobs");
  const saved = (list) => list.filter((job) => job.state === "saved").length;
  drawJobs();
  if (saved(jobs) !== saved(before)) {
    await loadGallery();
    const done = jobs.find((job) => job.state === "saved");
    if (before.length && done) await show(done.images[0]);
  }
  if (jobs.some(isAlive)) {
    timer = setTimeout(() => look().catch(showFault), 500);
  }
}

function isAlive(job) {
  return !["saved", "failed", "cancelled"].includes(job.state);
}

function drawJobs() {
  const latest = jobs.filter((job, place) => place === 0 || isAlive(job)).slice(0, 12);
  const box = document.getElementById("jobs");
  if (!latest.length) box.replaceChildren(element("p", { class: "empty" }, "Nothing. Images appear below when they are made."));
  else box.replaceChildren(...latest.map(jobLine));
}

function jobLine(job) {
  const texts = {
    waiting: "waiting", loading: "loading the model and compiling", sampling: `step ${job.step} of ${job.total}`,
    saved: "saved", cancelled: "cancelled", failed: job.error,
  };
  const line = element("div", { class: "job" },
    element("p", { class: "words" }, job.prompt || `request ${job.number}`),
    element("p", { class: job.state === "failed" ? "state bad" : "state" }, texts[job.state]));
  if (isAlive(job)) {
    const bar = element("progress", { max: job.total, "aria-label": `progress of request ${job.number}` });
    if (job.state !== "loading") bar.value = job.step;
    const cancel = () => attempt(async () => {
      await post(`/api/jobs/${job.number}/cancel`, {});
      await look();
    });
    line.append(bar, element("button", { type: "button", class: "small", onclick: cancel }, "Cancel"));
  }
  return line;
}

async function loadGallery(older = false) {
  const last = older ? gallery.lastElementChild.dataset.name : "";
  const found = await get(`/api/gallery?before=${encodeURIComponent(last)}`);
  const made = found.images.map((name) => element("button", {
    type: "button", "data-name": name, "aria-pressed": "false", "aria-label": `show ${name}`, onclick: () => attempt(() => show(name)),
  }, picture(name, "")));
  if (older) gallery.append(...made);
  else gallery.replaceChildren(...made);
  if (!gallery.children.length) gallery.append(element("p", { class: "empty" }, "None yet."));
  document.getElementById("more").hidden = !found.more;
}

async function show(name) {
  const image = await get(`/api/image?name=${encodeURIComponent(name)}`);
  const fields = image.fields;
  const list = element("dl");
  const add = (key, value) => list.append(element("dt", {}, key.replaceAll("_", " ")), element("dd", {}, text(value)));
  const entries = Object.entries(fields).flatMap(([key, value]) => {
    if (key === "settings" && value !== null && typeof value === "object") return Object.entries(value);
    if (key === "lora" && Array.isArray(value)) return value.map((lora) => ["LoRA", `${lora.file} at ${lora.weight}`]);
    return [[key, value]];
  });
  const isHash = ([key]) => key.endsWith("sha256");
  for (const [key, value] of entries.filter((entry) => !isHash(entry))) add(key, value);
  add("size", image.size.join(" × "));
  add("file", name);
  for (const [key, value] of entries.filter(isHash)) add(key, value);
  const note = element("p", { class: "hint", id: "reused", role: "status" });
  const reuse = element("button", { type: "button", onclick: () => { note.textContent = useSettings(fields); } }, "Use these settings");
  const actions = element("div", { class: "actions" }, reuse);
  if (hasSource) actions.append(element("button", { type: "button", onclick: () => begin(name) }, "Begin from this image"));
  const shown = document.getElementById("shown");
  shown.replaceChildren(picture(name, fields.prompt || "an image without a prompt"), element("div", {}, list, actions, note));
  shown.hidden = false;
  for (const button of gallery.children) button.setAttribute("aria-pressed", String(button.dataset.name === name));
}

function text(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

// Fill the form with the fields of an image that have the names of settings, and with its LoRAs. Returns what is left out.
function useSettings(fields) {
  const all = { ...fields, ...(typeof fields.settings === "object" ? fields.settings : {}), first_index: fields.index };
  for (const setting of settings) {
    const input = form.elements[setting.name];
    let value = all[setting.name];
    if (value === undefined && UNWRITTEN.includes(setting.name)) continue;
    if (value === undefined || typeof value === "object") value = setting.default;
    if (["integer", "number"].includes(setting.kind) && typeof value === "string") value = Number(value);
    setValue(input, value);
  }
  const left = [...useLoras(fields.lora), ...FILES.filter((key) => key in fields).map((key) => `${key.replaceAll("_", " ")} ${text(fields[key])}`)];
  leaveOut();
  form.elements.prompt.focus();
  const begun = Number(fields.index) > 0 ? ` It is image ${fields.index} of its seed, counted from 0: first index is set.` : "";
  return `Not taken over: ${["the number of images", "the model", "its precision", ...left].join("; ")}.${begun}`;
}

// Choose the LoRAs of an image that the list has, by the names of their files. Returns what is left out.
function useLoras(loras) {
  const names = [...loraList.options].map((option) => option.value), left = [];
  chosen = [];
  for (const lora of Array.isArray(loras) ? loras : []) {
    if (lora === null || typeof lora !== "object" || lora.from_prompt) continue; // the prompt names it again
    const found = names.filter((name) => name.split("/").pop() === lora.file);
    if (found.length === 1) addLora(found[0], Number(lora.weight ?? 1));
    else left.push(`LoRA ${lora.file} at ${lora.weight} (${found.length ? "several have this name" : "it is not in the list"})`);
    const parts = LORA_PARTS.filter((part) => (lora[part] ?? null) !== null);
    if (parts.length) left.push(`${parts.join(", ").replaceAll("_", " ")} of LoRA ${lora.file}`);
  }
  drawLoras();
  return left;
}
