// The image to begin from, and the brush that paints its mask.

import { attempt, element, fileAddress, upload } from "./request.js";

const box = document.getElementById("source");
let name = null;
let mask = null; // the canvas of the mask: painted where the image is made anew
let erase = false;

export function setUpSource() {
  document.getElementById("source-part").hidden = false;
  const file = document.getElementById("source-file");
  file.addEventListener("change", () => attempt(async () => {
    if (file.files.length) begin((await upload(file.files[0])).name);
    file.value = "";
  }));
}

// Begin from an image of the server.
export function begin(image) {
  name = image;
  const picture = element("img", { alt: "the image to begin from" });
  mask = element("canvas", { "aria-label": "Brush: paint what is made anew. Without paint, all of it is.", role: "img" });
  picture.addEventListener("load", () => {
    mask.width = picture.naturalWidth;
    mask.height = picture.naturalHeight;
    picture.classList.toggle("pixels", picture.naturalWidth <= 128);
  });
  picture.src = fileAddress(name);
  const size = element("input", { type: "range", id: "brush-size", min: 1, max: 40, value: 12 });
  const eraser = element("input", { type: "checkbox", id: "brush-erase" });
  eraser.addEventListener("change", () => { erase = eraser.checked; });
  erase = false;
  paintOn(mask, size);
  const button = (words, work) => element("button", { type: "button", class: "small", onclick: work }, words);
  box.replaceChildren(
    element("div", { class: "canvas" }, picture, mask),
    element("label", { for: "brush-size" }, "brush size", size),
    element("label", { for: "brush-erase" }, eraser, "erase"),
    element("div", { class: "actions" },
      button("Clear mask", () => pen(mask).clearRect(0, 0, mask.width, mask.height)), button("Invert mask", () => invert(mask)),
      button("No image", leaveOut)));
}

// Begin from no image.
export function leaveOut() {
  name = mask = null;
  box.replaceChildren();
}

// What a request needs: the names of the image and of its mask, which is sent first.
export async function sourceOf() {
  if (name === null) return {};
  if (!isPainted(mask)) return { image: name };
  const blob = await new Promise((done) => { blackAndWhite(mask).toBlob(done, "image/png"); });
  return { image: name, mask: (await upload(blob)).name };
}

function pen(canvas) {
  return canvas.getContext("2d", { willReadFrequently: true });
}

function paintOn(canvas, size) {
  let last = null;
  const paint = (event) => {
    const place = canvas.getBoundingClientRect();
    const scale = canvas.width / place.width;
    const [x, y] = [(event.clientX - place.x) * scale, (event.clientY - place.y) * scale];
    const context = pen(canvas);
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.strokeStyle = "#e0218a";
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = size.value / 100 * Math.max(canvas.width, canvas.height);
    context.beginPath();
    context.moveTo(...(last ?? [x, y]));
    context.lineTo(x, y);
    context.stroke();
    last = [x, y];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = null;
    paint(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons & 1) paint(event); });
}

function isPainted(canvas) {
  const pixels = pen(canvas).getImageData(0, 0, canvas.width, canvas.height).data;
  return pixels.some((value, place) => place % 4 === 3 && value > 127);
}

function invert(canvas) {
  const context = pen(canvas);
  context.globalCompositeOperation = "source-out";
  context.fillStyle = "#e0218a";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "source-over";
}

// White where it is painted, black elsewhere.
function blackAndWhite(canvas) {
  const made = element("canvas", { width: canvas.width, height: canvas.height });
  const context = made.getContext("2d");
  context.drawImage(canvas, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, made.width, made.height);
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#000";
  context.fillRect(0, 0, made.width, made.height);
  return made;
}
