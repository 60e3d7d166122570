// A sentence instead of nothing where the page's modules do not run. Every browser can read this file: no new syntax.
(function () {
  var FILE =
    "Browsers run the modules of this page only when a server sends them: " +
    "run python -m http.server in its folder, and open http://localhost:8000.";
  var OTHER =
    "A part of this page could not be loaded, or this browser is too old for it: " +
    "reload the page, or open it in a current Chrome, Edge, Firefox or Safari.";

  function stopped() {
    var line = document.getElementById("fault");
    var ready = document.documentElement.hasAttribute("data-ready"); // from then on, page.js says what goes wrong
    if (line && !ready && !line.textContent) line.textContent = location.protocol === "file:" ? FILE : OTHER;
  }

  addEventListener(
    "error",
    function (event) {
      if (event.target === window || event.target.tagName === "SCRIPT") stopped();
    },
    true, // what a script could not load does not bubble
  );
  if (!("noModule" in document.createElement("script"))) addEventListener("DOMContentLoaded", stopped);
})();
