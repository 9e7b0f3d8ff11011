"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (button) button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });

  const view = document.getElementById("supervision");
  const tip = document.getElementById("tip");
  if (!view || !tip) return;
  const samples = JSON.parse(document.getElementById("samples").textContent);
  for (const choice of view.querySelectorAll("input[name=mode]")) {
    choice.addEventListener("change", () => { view.dataset.mode = choice.value; });
  }

  const text = (x) => (x === null || x === undefined ? "-" : x.toFixed(3));
  const row = (table, name, value, bar) => {
    const line = table.insertRow();
    line.insertCell().textContent = name;
    line.insertCell().textContent = value;
    const cell = line.insertCell();
    if (bar !== undefined && bar !== null) {
      const mark = document.createElement("span");
      mark.className = "bar";
      // The probability that the view gives to this token.
      mark.style.width = (6 * Math.exp(bar)).toFixed(2) + "rem";
      cell.append(mark);
    }
  };
  let at = null;
  const show = (token) => {
    if (at) at.classList.remove("at");
    at = token;
    if (!token) { tip.hidden = true; return; }
    token.classList.add("at");
    const sample = samples[Number(token.closest(".tokens").dataset.sample)];
    const i = Number(token.dataset.i);
    const of = (name) => (sample[name] ? sample[name][i] : null);
    tip.textContent = "";
    const head = document.createElement("div");
    head.textContent = "token " + (i + 1) + ": " + JSON.stringify(sample.tokens[i]);
    const table = document.createElement("table");
    if (of("teacher_logp") === null) {
      row(table, "carries no loss", "");
    } else {
      row(table, "student", text(of("student_logp")), of("student_logp"));
      row(table, "teacher (reference)", text(of("teacher_logp")), of("teacher_logp"));
      (sample.auxiliary_logp || []).forEach((values, k) => row(table, "context " + (k + 1), text(values[i]), values[i]));
      if (sample.negative_logp) row(table, "wrong reference", text(of("negative_logp")), of("negative_logp"));
      row(table, "divergence", text(of("divergence")) + (of("clipped") ? " (clipped)" : ""));
      if (sample.weight) row(table, "reliability weight", text(of("weight")));
      if (sample.contrast) row(table, "contrast", text(of("contrast")));
      row(table, "student's entropy", text(of("entropy")));
    }
    tip.append(head, table);
    tip.hidden = false;
    const box = token.getBoundingClientRect();
    const width = tip.offsetWidth, height = tip.offsetHeight;
    tip.style.left = Math.max(4, Math.min(box.left, innerWidth - width - 4)) + "px";
    tip.style.top = (box.bottom + height + 8 < innerHeight ? box.bottom + 6 : Math.max(4, box.top - height - 6)) + "px";
  };
  view.addEventListener("pointerover", (event) => { const token = event.target.closest(".t"); if (token) show(token); });
  view.addEventListener("pointerleave", () => show(null));
  view.addEventListener("click", (event) => show(event.target.closest(".t")));
  // The tip stays with a token that the pointer is still on.
  addEventListener("scroll", () => { if (at) show(at.matches(":hover") ? at : null); }, { passive: true });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") return show(null);
    if (!at || (event.key !== "ArrowLeft" && event.key !== "ArrowRight")) return;
    const next = event.key === "ArrowRight" ? at.nextElementSibling : at.previousElementSibling;
    if (next && next.classList.contains("t")) { event.preventDefault(); show(next); }
  });
})();
