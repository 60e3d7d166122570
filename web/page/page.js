// The page: what each control does.

import { AdapterPanel } from "./adapter-panel.js";
import { outlook } from "./download.js";
import { Drawing } from "./drawing.js";
import { InputError, check } from "./errors.js";
import { changeOneWord, compareGuidance, showLooks } from "./experiments.js";
import { settings, takeFromAddress } from "./form.js";
import { captionNotes } from "./notes.js";
import { element } from "./pictures.js";
import { Session, loadManifest } from "./session.js";
import { begin, safely, say, sayFault } from "./status.js";

const find = (id) => document.getElementById(id);
const form = find("draw");
const on = (target, kind, action) => target.addEventListener(kind, safely(action));
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

/** The numbers beside the sliders. */
function showNumbers() {
  for (const name of ["guidance", "steps", "strength"]) find(`${name}-value`).textContent = find(name).value;
}

/** What is odd about the prompt, as the command says it. */
function showNotes(prompt) {
  const notes = captionNotes(prompt, session.tokenizer, adapters.chosen ? null : known);
  if (!prompt.trim()) notes.push("the prompt is empty; the miniature draws whatever the noise suggests");
  const lines = notes.map((note) => `Note: ${note}.`);
  if ([...find("notes").children].map((each) => each.textContent).join() === lines.join()) return; // read out already
  find("notes").replaceChildren(...lines.map((line) => element("li", line)));
}

/** What a click on the button will load. */
async function showSize() {
  const { missing, keeps } = await outlook(import.meta.url, manifest.files);
  const size = `${megabytes(missing)} MB are loaded`;
  const once = keeps ? `Once, ${size}, and kept in this browser.` : `${size}.`;
  find("size").textContent = missing ? once : "The model is in this browser already, from an earlier visit.";
}

/** Draw what the form says. */
async function draw() {
  const counts = session.wish();
  await session.ready();
  if (!counts()) return;
  const wanted = settings();
  showNotes(wanted.prompt);
  await drawing.draw(counts, wanted);
}

/** Draw an experiment into its list. */
async function experiment(name) {
  const counts = session.wish();
  await session.ready();
  if (!counts()) return;
  begin("Drawing …");
  const list = find(`${name}-pictures`);
  if (await EXPERIMENTS[name](list, settings(), (wanted) => session.draw(counts, wanted))) say("Drawn.");
}

/** Wait for a change of the adapter, and draw with it. */
async function adapt(change) {
  if (await change) await draw();
}

/** A listing of a module below its summary, fetched when it is opened. */
async function showSource(details) {
  const code = details.querySelector("code");
  if (!details.open || code.textContent) return;
  const response = await fetch(details.dataset.source).catch(() => null);
  if (!response?.ok) throw new InputError(`${details.dataset.source} could not be loaded; open the listing again`);
  code.textContent = await response.text();
}

const manifest = await loadManifest().catch((error) => {
  sayFault(error);
  throw error;
});
const known = new Set(manifest.words);
const total = Object.values(manifest.files).reduce((sum, { bytes }) => sum + bytes, 0);
const session = new Session(manifest.files, {
  loading() {
    begin("Loading the model …");
    find("progress").hidden = false;
  },
  arrived(bytes) {
    find("bar").value = bytes / total;
    find("bytes").textContent = `${megabytes(bytes)} of ${megabytes(total)} MB`;
  },
  loaded(error) {
    find("progress").hidden = true;
    if (error) return;
    find("go").textContent = "Draw";
    find("size").hidden = true;
  },
  forgotten() {
    drawing.forget();
    adapters.forget();
  },
});
const drawing = new Drawing(session);
const adapters = new AdapterPanel(session);
const EXPERIMENTS = {
  "guidance-experiment": compareGuidance,
  "word-experiment": (list, wanted, drawOne) => changeOneWord(list, wanted, manifest.attributes.colours, drawOne),
  "look-experiment": showLooks,
};

for (const [name, words] of Object.entries(manifest.attributes)) find(name).textContent = words.join(", ");
on(form, "submit", draw);
form.addEventListener("input", showNumbers);
on(find("another"), "click", () => {
  form.elements.seed.value = Math.floor(Math.random() * 10000);
  return draw();
});
for (const button of document.querySelectorAll("[data-prompt]")) {
  on(button, "click", () => {
    form.elements.prompt.value = button.dataset.prompt;
    return draw();
  });
}
on(find("step"), "input", () => drawing.scrub());
for (const name of Object.keys(EXPERIMENTS)) on(find(name), "click", () => experiment(name));
on(find("adapter-file"), "change", ({ target }) => target.files.length && adapt(adapters.use(target.files[0])));
on(find("strength"), "input", showNumbers);
on(find("strength"), "change", () => adapt(adapters.strengthen()));
on(find("adapter-off"), "click", () => adapt(adapters.takeOff()));
on(find("drop"), "dragover", () => {});
on(find("drop"), "drop", ({ dataTransfer }) => {
  check(dataTransfer.files.length, "what was dropped is no file");
  return adapt(adapters.use(dataTransfer.files[0]));
});
for (const details of document.querySelectorAll("details[data-source]")) {
  on(details, "toggle", () => showSource(details));
}
try {
  takeFromAddress(location.href);
} catch (error) {
  sayFault(error);
}
showNumbers();
await showSize();
find("go").disabled = false;
document.documentElement.dataset.ready = ""; // everything answers from here on
