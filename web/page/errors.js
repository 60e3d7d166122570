// Errors whose message is meant for the reader of the page; any other error is a fault of the page itself.

/** Something that the reader gave, or that their browser lacks: the message says what, and what to do. */
export class InputError extends Error {}

/** Raise an InputError unless a condition holds. */
export function check(condition, message) {
  if (!condition) throw new InputError(message);
}
