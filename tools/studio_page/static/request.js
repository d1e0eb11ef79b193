// Requests to the server, and small helpers to build elements. No text is ever read as HTML.

export class Fault extends Error {}

export async function get(address) {
  return answerOf(await fetch(address));
}

export async function post(address, content) {
  const headers = { "Content-Type": "application/json" };
  return answerOf(await fetch(address, { method: "POST", headers, body: JSON.stringify(content) }));
}

// Send an image file, and return the server's name of it.
export async function upload(blob) {
  const headers = { "Content-Type": "application/octet-stream" };
  return answerOf(await fetch("/api/uploads", { method: "POST", headers, body: blob }));
}

async function answerOf(response) {
  let answer = null;
  try {
    answer = await response.json();
  } catch {
    throw new Fault(`the server answered ${response.status} without a text`);
  }
  if (!response.ok) throw new Fault(answer.error);
  return answer;
}

// Show what went wrong at the top of the page, until the next thing goes right.
export function showFault(error) {
  const line = document.getElementById("fault");
  const lost = error instanceof TypeError;
  line.textContent = lost ? "the server does not answer: is tools/studio.py still running?" : error.message;
  line.hidden = false;
  if (!(error instanceof Fault) && !lost) console.error(error);
}

export function clearFault() {
  document.getElementById("fault").hidden = true;
}

// Run what the user asked for, and show its error if there is one.
export async function attempt(work) {
  try {
    await work();
    clearFault();
  } catch (error) {
    showFault(error);
  }
}

export function element(name, attributes = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null) made.setAttribute(key, value);
  }
  made.append(...content);
  return made;
}

export function fileAddress(name) {
  return `/files/${name.split("/").map(encodeURIComponent).join("/")}`;
}

// An image, enlarged without smoothing if it is small.
export function picture(name, alt) {
  const image = element("img", { src: fileAddress(name), alt, loading: "lazy" });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 128));
  return image;
}

// The input of a setting with its label and its help. `value` is shown instead of the default.
export function field(setting, prefix) {
  const id = `${prefix}-${setting.name}`;
  const input = inputOf(setting);
  input.id = id;
  input.name = setting.name;
  input.dataset.kind = setting.kind;
  const box = element("div", { class: "field" });
  const words = setting.name.replaceAll("_", " ");
  const label = setting.kind === "flag" ? element("label", { for: id }, input, words) : element("label", { for: id }, words, input);
  box.append(label);
  if (setting.help) {
    box.append(element("p", { class: "hint", id: `${id}-help` }, setting.help));
    input.setAttribute("aria-describedby", `${id}-help`);
  }
  return box;
}

function inputOf(setting) {
  if (setting.kind === "choice") {
    const select = element("select");
    if (setting.optional) select.append(element("option", { value: "" }, ""));
    for (const choice of setting.choices) select.append(element("option", { value: JSON.stringify(choice) }, String(choice)));
    select.value = setting.default === null ? "" : JSON.stringify(setting.default);
    return select;
  }
  if (setting.kind === "flag") return element("input", { type: "checkbox", checked: setting.default === true });
  if (setting.kind === "integer" || setting.kind === "number") {
    const low = setting.low ?? setting.above, high = setting.high ?? setting.below;
    const step = setting.kind === "integer" ? 1 : "any";
    return element("input", { type: "number", min: low, max: high, step, value: setting.default ?? "" });
  }
  const lines = setting.kind === "lines" || /prompt/.test(setting.name);
  const input = element(lines ? "textarea" : "input", lines ? { rows: 2 } : { type: "text" });
  input.value = setting.default ?? "";
  return input;
}

// The values of a form's settings that are filled in, by name.
export function valuesOf(form, settings) {
  const values = {};
  for (const setting of settings) {
    const input = form.elements[setting.name];
    const value = input.value;
    if (setting.kind === "flag") values[setting.name] = input.checked;
    else if (setting.kind === "text") values[setting.name] = value;
    else if (value.trim() === "") continue;
    else if (setting.kind === "choice") values[setting.name] = JSON.parse(value);
    else if (setting.kind === "lines") values[setting.name] = value.split("\n").filter((line) => line.trim());
    else values[setting.name] = Number(value);
  }
  return values;
}

export function setValue(input, value) {
  if (input.dataset.kind === "flag") input.checked = value === true;
  else if (input.dataset.kind === "choice") input.value = value === null ? "" : JSON.stringify(value);
  else if (Array.isArray(value)) input.value = value.join("\n");
  else input.value = value ?? "";
}
