// Before anything is painted: light or dark as the reader has chosen on the other pages, else as the system says.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("quarto-color-scheme"); // "alternate" is the dark one
  } catch {
    // storage may be switched off
  }
  if (chosen) document.documentElement.dataset.theme = chosen === "alternate" ? "dark" : "light";
})();
