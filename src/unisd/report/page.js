"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (button) button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });

  // ---------------------------------------------------------------- the box with values
  const tip = document.getElementById("tip");
  const made = (name, text, className) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  // rows: name, value, and what is shown behind them (an element or nothing)
  const tell = (title, rows, box) => {
    const table = made("table");
    for (const [name, value, more] of rows) {
      const line = table.insertRow();
      line.insertCell().textContent = name;
      line.insertCell().textContent = value;
      const cell = line.insertCell();
      if (more) cell.append(more);
    }
    tip.replaceChildren(made("div", title), table);
    tip.hidden = false;
    const width = tip.offsetWidth, height = tip.offsetHeight;
    tip.style.left = Math.max(4, Math.min(box.left, innerWidth - width - 4)) + "px";
    tip.style.top = (box.bottom + height + 8 < innerHeight ? box.bottom + 6 : Math.max(4, box.top - height - 6)) + "px";
  };
  let at = null, again = null; // what the box tells of: a token or the line in a curve; and how it was told
  const leave = () => {
    if (at && at.classList.contains("t")) at.classList.remove("at"); else if (at) at.remove();
    at = null;
    tip.hidden = true;
  };

  // ---------------------------------------------------------------- curves
  for (const figure of document.querySelectorAll("figure[data-curve]")) {
    const { box, steps, series } = JSON.parse(figure.dataset.curve);
    const known = [...new Set(series.flatMap(([, points]) => points.map(([step]) => step)))].sort((a, b) => a - b);
    if (!known.length) continue;
    let place = known.length - 1;
    const show = (next) => {
      place = Math.max(0, Math.min(known.length - 1, next));
      const step = known[place];
      const area = figure.getBoundingClientRect();
      const share = box[0] + (step - steps[0]) / (steps[1] - steps[0]) * (box[1] - box[0]);
      leave();
      at = made("i", "", "line");
      again = () => show(place);
      at.style.left = (100 * share).toFixed(2) + "%";
      figure.append(at);
      const rows = series.map(([name, points]) => [name, points.find(([x]) => x === step)])
        .filter(([, point]) => point).map(([name, point]) => [name, String(point[1])]);
      const left = area.left + share * area.width;
      tell("step " + step, rows, { left: left + 8, top: area.top, bottom: area.top + area.height / 3 });
    };
    const nearest = (event) => {
      const area = figure.getBoundingClientRect();
      const share = ((event.clientX - area.left) / area.width - box[0]) / (box[1] - box[0]);
      const step = steps[0] + share * (steps[1] - steps[0]);
      const distances = known.map((x) => Math.abs(x - step));
      show(distances.indexOf(Math.min(...distances)));
    };
    figure.addEventListener("pointermove", nearest);
    figure.addEventListener("pointerdown", nearest);
    figure.addEventListener("pointerleave", leave);
    figure.addEventListener("focus", () => { if (figure.matches(":focus-visible")) show(place); });
    figure.addEventListener("blur", leave);
    figure.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move) { event.preventDefault(); show(place + move); }
    });
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") leave(); });
  // The box stays with what the pointer is still on, or has the focus.
  addEventListener("scroll", () => {
    if (at) if (at.matches(":hover") || at.parentElement.matches("figure:hover, :focus")) again(); else leave();
  }, { passive: true });

  // ---------------------------------------------------------------- supervision, token by token
  const view = document.getElementById("supervision");
  if (!view) return;
  const samples = JSON.parse(document.getElementById("samples").textContent);
  for (const choice of view.querySelectorAll("input[name=mode]")) {
    choice.addEventListener("change", () => { view.dataset.mode = choice.value; });
  }
  const number = (x) => (x === null || x === undefined ? "-" : x.toFixed(3));
  const bar = (logp) => {
    if (logp === null || logp === undefined) return null;
    const mark = made("span", "", "bar");
    mark.style.width = (6 * Math.exp(logp)).toFixed(2) + "rem"; // the probability that the view gives to this token
    return mark;
  };
  const rowsOf = (sample, i) => {
    const of = (name) => (sample[name] ? sample[name][i] : null);
    if (of("teacher_logp") === null) return [["carries no loss", ""]];
    const view = (name, logp) => [name, number(logp), bar(logp)];
    const rows = [view("student", of("student_logp")), view("teacher (reference)", of("teacher_logp"))];
    if (of("teacher_top") !== null) rows.push(view("teacher's own: " + JSON.stringify(of("teacher_top")), of("teacher_top_logp")));
    sample.auxiliary_logp.forEach((values, k) => rows.push(view("context " + (k + 1), values[i])));
    if (sample.negative_logp) rows.push(view("wrong reference", of("negative_logp")));
    rows.push(["divergence", number(of("divergence")) + (of("clipped") ? " (clipped)" : "")]);
    if (sample.weight) rows.push(["reliability weight", number(of("weight"))]);
    if (sample.contrast) rows.push(["contrast", number(of("contrast"))]);
    rows.push(["student's entropy", number(of("entropy"))]);
    return rows;
  };
  const show = (token) => {
    leave();
    if (!token) return;
    at = token;
    again = () => show(token);
    token.classList.add("at");
    const sample = samples[Number(token.closest(".tokens").dataset.sample)];
    const i = Number(token.dataset.i);
    tell("token " + (i + 1) + ": " + JSON.stringify(sample.tokens[i]), rowsOf(sample, i), token.getBoundingClientRect());
  };
  view.addEventListener("pointerover", (event) => { const token = event.target.closest(".t"); if (token) show(token); });
  view.addEventListener("pointerleave", leave);
  view.addEventListener("click", (event) => show(event.target.closest(".t")));
  for (const tokens of view.querySelectorAll(".tokens")) {
    tokens.addEventListener("focus", () => { if (tokens.matches(":focus-visible")) show(tokens.querySelector(".t")); });
    tokens.addEventListener("blur", leave);
  }
  addEventListener("keydown", (event) => {
    if (!at || !at.classList.contains("t") || (event.key !== "ArrowLeft" && event.key !== "ArrowRight")) return;
    const next = event.key === "ArrowRight" ? at.nextElementSibling : at.previousElementSibling;
    if (next && next.classList.contains("t")) { event.preventDefault(); show(next); }
  });
})();
