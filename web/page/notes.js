// What one should know about a prompt before it is drawn; generate-images says the same (lesson 26).

const NAMED = 8; // words; more are counted

/** Quoted as Python's repr does. */
const quoted = (text) => (text.includes("'") && !text.includes('"') ? `"${text}"` : `'${text.replaceAll("'", "\\'")}'`);

/** The beginning of a text, with an ellipsis for the rest. */
const shortened = (text, limit) => {
  const characters = Array.from(text);
  return characters.length > limit ? `${characters.slice(0, limit).join("")} …` : text;
};

/** One sentence for words that training never showed, and one for what does not fit.
 *
 * @param {Set<string> | null} known the words of all captions; null where an adapter may have taught others
 */
export function captionNotes(prompt, tokenizer, known) {
  const notes = [];
  const words = known ? (prompt.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? []) : [];
  const fresh = [...new Set(words)].filter((word) => !known.has(word));
  if (fresh.length) {
    const named = fresh.slice(0, NAMED).map((word) => quoted(shortened(word, 30)));
    if (fresh.length > NAMED) named.push(`${fresh.length - NAMED} more`);
    const them = fresh.length === 1 ? "it" : "them";
    notes.push(
      `the miniature was never shown ${named.join(", ")}; what it makes of ${them} is chance until you train it`,
    );
  }
  const numbers = tokenizer.numbers(prompt);
  const room = tokenizer.length - 2; // one for the beginning, one for the end
  if (numbers.length > room) {
    const lost = tokenizer.decode(numbers.slice(room));
    notes.push(`the prompt has ${numbers.length} tokens and ${room} fit; cut off: ${quoted(shortened(lost, 60))}`);
  }
  return notes;
}
