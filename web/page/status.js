// Where things stand, and what went wrong: two lines of the page that screen readers read out.

import { InputError } from "./errors.js";

const line = (id) => document.getElementById(id);

/** Say where things stand. What went wrong before stays to be read. */
export function say(text) {
  line("status").textContent = text;
}

/** Say that something new begins: what went wrong before is over. */
export function begin(text) {
  say(text);
  line("fault").textContent = "";
}

/** Say what went wrong: in its own words what the reader can mend, and as a fault of the page what they cannot. */
export function sayFault(error) {
  const words = `${error.message || error}`.replace(/\.+$/, "");
  const text = `${words[0].toUpperCase()}${words.slice(1)}.`;
  say("");
  line("fault").textContent =
    error instanceof InputError ? text : `Something on this page went wrong: ${text} Try again, or reload it.`;
  if (!(error instanceof InputError)) console.error(error);
}

/** An action as a listener: what it throws is said, and the page goes on. */
export const safely = (action) => async (event) => {
  event.preventDefault();
  try {
    await action(event);
  } catch (error) {
    sayFault(error);
  }
};
