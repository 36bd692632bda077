// Measures the boxes of all text that is seen, of the page and within figures, and says what is wrong with them.
(leastContrast) => {
  const found = { texts: 0, overlaps: [], cut: [], overflow: [], contrast: [] };
  const width = document.documentElement.clientWidth;
  const scrolls = (element) => element.closest(".scroll, pre");
  const seen = (element) => {
    if (element.closest("#js-plotly-tester, script, style, title, .hoverlayer")) return false;
    const style = getComputedStyle(element);
    return style.visibility !== "hidden" && style.display !== "none" && Number(style.opacity) > 0;
  };
  const short = (text) => text.trim().replace(/\s+/g, " ").slice(0, 50);

  const boxes = [];
  const add = (element, text, rectangle) => {
    if (rectangle.width < 1 || rectangle.height < 1) return;
    boxes.push({ element, text: short(text), left: rectangle.left, right: rectangle.right, top: rectangle.top, bottom: rectangle.bottom });
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || !seen(parent) || parent.closest("svg")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rectangle of range.getClientRects()) add(parent, node.data, rectangle);
  }
  for (const text of document.querySelectorAll("svg text")) {
    if (text.textContent.trim() && seen(text)) add(text, text.textContent, text.getBoundingClientRect());
  }
  found.texts = boxes.length;

  // Letters do not fill their line: a fifth of its height lies above and below them.
  const slack = (box) => Math.min(0.2 * (box.bottom - box.top), 4);
  const ordered = boxes.toSorted((a, b) => a.top - b.top);
  ordered.forEach((one, number) => {
    for (let next = number + 1; next < ordered.length && ordered[next].top < one.bottom; next++) {
      const other = ordered[next];
      if (scrolls(one.element) !== scrolls(other.element)) continue;
      const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const down = Math.min(one.bottom - slack(one), other.bottom - slack(other)) - Math.max(one.top + slack(one), other.top + slack(other));
      if (across > 1.5 && down > 1.5) found.overlaps.push(`${one.text} | ${other.text}`);
    }
  });

  for (const box of boxes) {
    if (!scrolls(box.element) && (box.left < -1 || box.right > width + 1)) found.cut.push(`${box.text}: beyond the page`);
    for (let outer = box.element; outer; outer = outer.parentElement) {
      if (outer.matches(".scroll, pre")) break;
      const hides = outer.matches("svg.main-svg") || getComputedStyle(outer).overflowX === "hidden";
      if (!hides || outer === document.body || outer === document.documentElement) continue;
      const edge = outer.getBoundingClientRect();
      if (box.left < edge.left - 1 || box.right > edge.right + 1 || box.top < edge.top - 2 || box.bottom > edge.bottom + 2) {
        found.cut.push(`${box.text}: beyond ${outer.className.baseVal ?? outer.className}`);
        break;
      }
    }
  }
  if (document.documentElement.scrollWidth > width) found.overflow.push(`${document.documentElement.scrollWidth} of ${width} pixels`);
  for (const box of document.querySelectorAll(".scroll, pre")) {
    if (box.scrollWidth > box.clientWidth + 1 && box.tabIndex < 0) found.overflow.push(`${short(box.textContent)}: no key reaches it`);
  }

  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [red, green, blue] = rgba(colour).map((part) => (part / 255 <= 0.03928 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    for (let outer = element; outer; outer = outer.parentElement) {
      const colour = getComputedStyle(outer).backgroundColor;
      if (rgba(colour)[3] > 0) return colour;
    }
    return "white";
  };
  const judged = new Set();
  for (const { element, text } of boxes) {
    const style = getComputedStyle(element);
    const colour = element.closest("svg") ? style.fill : style.color;
    const pair = `${colour} on ${behind(element)}`;
    if (judged.has(pair)) continue;
    judged.add(pair);
    const [low, high] = [luminance(colour), luminance(behind(element))].toSorted((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < leastContrast) found.contrast.push(`${text}: ${pair} is ${ratio.toFixed(2)}`);
  }
  return found;
}
