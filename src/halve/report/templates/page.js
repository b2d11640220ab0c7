"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const places = Array.from(document.querySelectorAll("[data-chart]"));

  // Text and grid follow the page's theme; on paper they are dark on white.
  function themed(print) {
    const styles = getComputedStyle(document.documentElement);
    const text = print ? "#1c1f23" : styles.getPropertyValue("--text").trim();
    const line = print ? "#d5dae0" : styles.getPropertyValue("--line").trim();
    const axis = { "color": text, "gridcolor": line, "zerolinecolor": line };
    const flat = {
      "font.color": text, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
      "font.family": "system-ui, sans-serif",
    };
    for (const name of ["xaxis", "yaxis"]) {
      for (const [key, value] of Object.entries(axis)) flat[`${name}.${key}`] = value;
    }
    return flat;
  }

  function recolour(print) {
    for (const place of places) Plotly.relayout(place, themed(print));
  }

  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const drawn = places.map((place) => {
    const { data, layout } = charts[place.dataset.chart];
    return Plotly.newPlot(place, data, layout, config);
  });
  Promise.all(drawn).then(() => {
    recolour(false);
    document.documentElement.dataset.charts = "drawn";
  });

  dark.addEventListener("change", () => recolour(false));

  for (const button of document.querySelectorAll("[data-scale-of]")) {
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(pressed));
      Plotly.relayout(`chart-${button.dataset.scaleOf}`, { "yaxis.type": pressed ? "log" : "linear", "yaxis.autorange": true });
    });
  }

  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = Array.from(document.querySelectorAll("details:not([open])"));
    for (const details of closed) details.open = true;
    recolour(true);
  });
  window.addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
    recolour(false);
  });
})();
