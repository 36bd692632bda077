// Draws every figure in the colours of the reader's setting, and again when the setting changes or the page is printed.
(() => {
  const roles = {{ roles | tojson }};
  const config = { displayModeBar: false, responsive: true };
  const recoloured = (value, colours) => {
    if (typeof value === "string") return colours.get(value.toLowerCase()) ?? value;
    if (Array.isArray(value)) return typeof value.at(-1) === "number" ? value : value.map((one) => recoloured(one, colours));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, recoloured(one, colours)]));
  };
  const drawAll = () => {
    const style = getComputedStyle(document.documentElement);
    const colours = new Map(roles.map(([light, role]) => [light, style.getPropertyValue(`--${role}`).trim()]));
    for (const script of document.querySelectorAll("script[data-figure]")) {
      const figure = recoloured(JSON.parse(script.textContent), colours);
      Plotly.newPlot(script.dataset.figure, figure.data, figure.layout, config);
    }
    document.documentElement.dataset.drawn = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  };
  drawAll();
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", drawAll);
})();
