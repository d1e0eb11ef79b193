"use strict";
// A cursor on each plot: the mouse, a finger or the arrow keys move it, and the legend shows the values there.
(() => {
  const shown = (value) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (size && (size < 1e-4 || size >= 1e6)) return value.toExponential(3);
    return String(Number(value.toPrecision(5)));
  };

  // The place of the step that is nearest to `step` in a sorted list.
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
  };

  for (const figure of document.querySelectorAll("figure.chart")) {
    const plot = figure.querySelector(".plot");
    const data = JSON.parse(figure.querySelector("script").textContent);
    const values = figure.querySelectorAll(".legend .value");
    const stepText = figure.querySelector(".legend .step");
    const steps = [...new Set(data.series.flatMap((series) => series.x))].sort((a, b) => a - b);
    const cursor = document.createElement("div");
    cursor.className = "cursor";
    let place = -1;

    const show = (to) => {
      place = Math.max(0, Math.min(steps.length - 1, to));
      const step = steps[place];
      cursor.style.left = `${100 * (step - data.first) / (data.last - data.first)}%`;
      plot.append(cursor);
      stepText.textContent = `step ${step.toLocaleString("en")}`;
      const texts = data.series.map((series, number) => {
        const at = nearest(series.x, step);
        const far = series.x[at] !== step && (step < series.x[0] || step > series.x[series.x.length - 1]);
        const text = far ? "–" : shown(series.y[at]);
        values[number].textContent = text;
        return `${series.name} ${text}`;
      });
      plot.setAttribute("aria-valuenow", step);
      plot.setAttribute("aria-valuetext", `step ${step}: ${texts.join(", ")}`);
    };
    const hide = () => {
      cursor.remove();
      stepText.textContent = "";
      values.forEach((value) => { value.textContent = ""; });
    };
    const follow = (event) => {
      const box = plot.getBoundingClientRect();
      const part = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
      show(nearest(steps, data.first + part * (data.last - data.first)));
    };

    plot.tabIndex = 0;
    plot.setAttribute("role", "slider");
    plot.setAttribute("aria-orientation", "horizontal");
    plot.setAttribute("aria-label", `${plot.dataset.label}: step`);
    plot.setAttribute("aria-valuemin", steps[0]);
    plot.setAttribute("aria-valuemax", steps[steps.length - 1]);
    plot.setAttribute("aria-valuenow", steps[steps.length - 1]);
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("focus", () => { if (place < 0) show(steps.length - 1); else show(place); });
    plot.addEventListener("keydown", (event) => {
      const far = Math.max(1, Math.round(steps.length / 20));
      const moves = { ArrowLeft: place - 1, ArrowDown: place - 1, ArrowRight: place + 1, ArrowUp: place + 1,
                      PageDown: place - far, PageUp: place + far, Home: 0, End: steps.length - 1 };
      if (event.key === "Escape") hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(moves[event.key]);
    });
  }
})();
