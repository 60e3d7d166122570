// Where things stand, and what went wrong: two lines of the page that screen readers read out.

import { InputError } from "./errors.js";

const line = (id) => document.getElementById(id);

/** Say where things stand. */
export function say(text) {
  line("status").textContent = text;
  line("fault").textContent = "";
}

/** Say what went wrong: in its own words what the reader can mend, and as a fault of the page what they cannot. */
export function sayFault(error) {
  const text = `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
  line("status").textContent = "";
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
