// Hover read-out of the charts: a cursor at the nearest step and every line's value there.
"use strict";
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const series = JSON.parse(svg.dataset.chart);
  const figure = svg.closest("figure");
  const heading = svg.querySelector("title");
  svg.setAttribute("aria-label", heading.textContent);
  heading.remove(); // the browser would show it as a second tooltip
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", 12);
  cursor.setAttribute("y2", height - 34);
  const tip = document.createElement("div");
  tip.className = "tip";

  const nearest = (xs, x) => {
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
    return best;
  };
  const hide = () => { cursor.remove(); tip.remove(); };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const anchor = series
      .map((line) => ({ line, i: nearest(line.x, x) }))
      .sort((a, b) => Math.abs(a.line.x[a.i] - x) - Math.abs(b.line.x[b.i] - x))[0];
    const step = anchor.line.step[anchor.i];
    const at = anchor.line.x[anchor.i];
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    svg.append(cursor);
    tip.textContent = "";
    const rows = [`step ${step.toLocaleString("en-US")}`];
    for (const line of series) {
      const i = line.step.indexOf(step);
      if (i >= 0) rows.push(series.length > 1 ? `${line.label}  ${line.text[i]}` : line.text[i]);
    }
    for (const row of rows) tip.append(Object.assign(document.createElement("div"), { textContent: row }));
    figure.append(tip);
    const frame = figure.getBoundingClientRect();
    const left = box.left - frame.left + (at / width) * box.width;
    const free = frame.width - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(free, left + (left > frame.width / 2 ? -tip.offsetWidth - 12 : 12)))}px`;
    tip.style.top = `${box.top - frame.top + 10}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
addEventListener("beforeprint", () => document.querySelectorAll("details.print").forEach((d) => { d.open = true; }));
