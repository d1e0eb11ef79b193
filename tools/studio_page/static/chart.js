// The loss of each step and its running mean, as an SVG.

const SPACE = "http://www.w3.org/2000/svg";
const WIDTH = 720, HEIGHT = 240, LEFT = 56, RIGHT = 10, TOP = 10, BOTTOM = 26;

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

// Round numbers from low to high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let number = Math.ceil(low / unit); number * unit <= high * (1 + 1e-9); number++) found.push(number * unit);
  return found;
}

export function lossChart(curve) {
  const values = [...curve.loss, ...curve.mean].filter((value) => value !== null);
  const top = Math.max(...values) * 1.05, bottom = Math.min(0, ...values);
  const first = curve.step[0], last = Math.max(curve.step[curve.step.length - 1], first + 1);
  const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first);
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - bottom) / (top - bottom || 1);
  const latest = curve.mean[curve.mean.length - 1];
  const name = `Loss by step, ${first} to ${curve.step[curve.step.length - 1]}. The mean is ${short(latest)} at the end.`;
  const chart = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", "aria-label": name });
  for (const value of ticks(bottom, top, 4)) {
    chart.append(shape("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "line" }));
    chart.append(shape("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const step of ticks(first, last, 6).filter(Number.isInteger)) {
    chart.append(shape("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, step));
  }
  chart.append(shape("path", { d: path(curve.step, curve.loss, x, y), class: "each" }));
  chart.append(shape("path", { d: path(curve.step, curve.mean, x, y), class: "mean" }));
  return chart;
}

// A loss that is not finite leaves a gap.
function path(steps, values, x, y) {
  let text = "", pen = "M";
  steps.forEach((step, place) => {
    if (values[place] === null) pen = "M";
    else {
      text += `${pen}${x(step).toFixed(1)} ${y(values[place]).toFixed(1)}`;
      pen = "L";
    }
  });
  return text;
}

export function short(value) {
  return value === null || value === undefined ? "–" : String(Number(value.toPrecision(3)));
}
