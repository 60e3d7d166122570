// The page: what each control does.

import { InputError } from "./errors.js";
import { changeOneWord, compareGuidance, showLooks } from "./experiments.js";
import { captionNotes } from "./notes.js";
import { Drawing } from "./drawing.js";
import { element } from "./pictures.js";
import { Session, loadManifest } from "./session.js";
import { safely, say, sayFault } from "./status.js";

const find = (id) => document.getElementById(id);
const form = find("draw");
const on = (target, kind, action) => target.addEventListener(kind, safely(action));
const FIELDS = ["prompt", "seed", "guidance", "steps"];

let chosen = null; // the adapter that pictures are drawn with, read again when its strength changes

/** What stands in the form. The worker checks the numbers. */
function settings() {
  const [prompt, ...numbers] = FIELDS.map((name) => form.elements[name].value);
  const [seed, guidance, steps] = numbers.map((text) => (text.trim() === "" ? NaN : Number(text)));
  return { prompt, seed, guidance, steps };
}

/** Settings in the address, so that lessons can link to them: ?prompt=…&seed=…&guidance=…&steps=… */
function takeFromAddress() {
  for (const [name, value] of new URLSearchParams(location.search)) {
    if (FIELDS.includes(name)) form.elements[name].value = value;
  }
}

/** The numbers beside the sliders. */
function showNumbers() {
  for (const name of ["guidance", "steps", "strength"]) find(`${name}-value`).textContent = find(name).value;
}

/** What is odd about the prompt, as the command says it. */
function showNotes(prompt) {
  const notes = captionNotes(prompt, session.tokenizer, chosen ? null : known);
  if (!prompt.trim()) notes.push("the prompt is empty; the miniature draws whatever the noise suggests");
  find("notes").replaceChildren(...notes.map((note) => element("li", `Note: ${note}.`)));
}

/** Draw what the form says. */
async function draw() {
  await session.ready();
  const wanted = settings();
  showNotes(wanted.prompt);
  await drawing.draw(wanted);
}

/** Say with which adapter pictures are drawn; null: with none. */
function showAdapter(file, layers) {
  chosen = file;
  find("adapter-name").textContent = file ? `Drawing with ${file.name} (${layers} layers).` : "";
  find("adapter-off").hidden = !file;
  if (!file) find("adapter-file").value = "";
}

/** Draw with the adapter in a file, or with null without. */
async function adapt(file) {
  await session.ready();
  say(file ? `Reading ${file.name} …` : "Taking the adapter off …");
  const strength = Number(find("strength").value);
  try {
    const { answer } = session.ask("adapt", { file: await file?.arrayBuffer(), strength });
    showAdapter(file, await answer);
  } catch (error) {
    if (error instanceof InputError && file) error.message = `the file ${file.name} cannot be used: ${error.message}`;
    throw error;
  }
  await draw();
}

/** A listing of a module below its summary, fetched when it is opened. */
async function showSource({ currentTarget: details }) {
  const code = details.querySelector("code");
  if (details.open && !code.textContent) code.textContent = await (await fetch(details.dataset.source)).text();
}

const manifest = await loadManifest().catch((error) => {
  sayFault(error);
  throw error;
});
const known = new Set(manifest.words);
const session = new Session(manifest, () => {
  drawing.forget();
  showAdapter(null);
});
const drawing = new Drawing(session);

const drawOne = (wanted) => session.ask("draw", wanted).answer; // null when something else was asked for meanwhile
const EXPERIMENTS = {
  "guidance-experiment": (list) => compareGuidance(list, settings(), drawOne),
  "word-experiment": (list) => changeOneWord(list, settings(), manifest.attributes.colours, drawOne),
  "look-experiment": async (list) => {
    const result = await drawOne(settings());
    if (result) showLooks(list, result);
  },
};

takeFromAddress();
showNumbers();
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
for (const [name, experiment] of Object.entries(EXPERIMENTS)) {
  on(find(name), "click", async () => {
    await session.ready();
    say("Drawing …");
    await experiment(find(`${name}-pictures`));
    say("Drawn.");
  });
}
on(
  find("adapter-file"),
  "change",
  ({
    target: {
      files: [file],
    },
  }) => file && adapt(file),
);
on(find("strength"), "input", showNumbers);
on(find("strength"), "change", () => chosen && adapt(chosen));
on(find("adapter-off"), "click", () => adapt(null));
on(find("drop"), "dragover", () => {});
on(
  find("drop"),
  "drop",
  ({
    dataTransfer: {
      files: [file],
    },
  }) => file && adapt(file),
);
for (const details of document.querySelectorAll("details[data-source]")) on(details, "toggle", showSource);
document.documentElement.dataset.ready = ""; // everything answers from here on
