// One tab stop a group; arrows move on. What a pointer sees on hovering is told in `detail`.
function stops(items, words, detail) {
  items.forEach((item, place) => {
    item.setAttribute("tabindex", place ? -1 : 0);
    item.addEventListener("focus", () => { detail.textContent = words(item); });
    item.addEventListener("keydown", (event) => {
      const next = items[place + ({ArrowRight: 1, ArrowLeft: -1}[event.key] ?? NaN)];
      if (next) { next.focus(); event.preventDefault(); }
    });
  });
}
for (const round of document.querySelectorAll(".round")) {
  const words = (node) => node.querySelector("title").textContent;
  stops([...round.querySelectorAll(".tree g")], words, round.querySelector(".detail"));
}
