// Lets the reader choose the moment that a map shows. Without it the map shows the last one.
for (const figure of document.querySelectorAll("[data-frames]")) {
  const frames = JSON.parse(figure.dataset.frames);
  const cells = [...figure.querySelectorAll(".cell")];
  const means = [...figure.querySelectorAll(".mean")];
  const moment = figure.querySelector(".moment");
  const slider = moment.querySelector("input");
  const show = () => {
    const ranks = frames.ranks[slider.value];
    cells.forEach((cell, i) => {
      cell.querySelector("rect").setAttribute("fill", frames.colours[ranks[i]]);
      cell.querySelector("title").textContent = `${frames.modules[i]}: rank ${ranks[i]}`;
      const number = cell.querySelector("text");
      if (number) {
        number.textContent = ranks[i];
        number.classList.toggle("on-dark", frames.dark[ranks[i]]);
      }
    });
    means.forEach((mean, row) => {
      const own = ranks.filter((_, i) => frames.rows[i] === row);
      mean.textContent = (own.reduce((a, b) => a + b, 0) / own.length).toFixed(1);
    });
    moment.querySelector("output").textContent = frames.titles[slider.value];
  };
  slider.max = frames.ranks.length - 1;
  slider.value = slider.max;
  slider.addEventListener("input", show);
  moment.hidden = false;
  show();
}
