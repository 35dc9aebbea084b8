// Before anything is drawn, so that no other theme is seen first; the rest are modules, which come later.
try {
  document.documentElement.dataset.theme = localStorage.getItem("loraplex.theme") || "";
} catch {
  // This browser keeps nothing: the theme is the system's.
}
