// Words to numbers: byte pair encoding as CLIP does it, read from the same tokenizer.json as in Python (lesson 20).

const MARKS = /(<\|startoftext\|>|<\|endoftext\|>)/;
// First CLIP's division into words, then the one of byte-level encoding, which has something to do only where a prompt
// spells a mark in capitals: both stand in tokenizer.json.
const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
const PARTS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\p{White_Space}\p{L}\p{N}]+/gu;

/** Bytes as visible characters: those that print stand for themselves, the others for what comes after all of those. */
const CHARACTERS = (() => {
  const prints = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(prints(byte) ? byte : next++));
})();

/** One character at a time, as Python's tokenizers do: a sentence as a whole would turn a last Σ into ς. */
function lowered(text) {
  return Array.from(text, (character) => character.toLowerCase()).join("");
}

/** The words of a text without marks. */
function words(text) {
  const normal = lowered(text.normalize("NFC").replace(/\p{White_Space}+/gu, " "));
  return (normal.match(WORDS) ?? []).flatMap((word) => word.match(PARTS) ?? []);
}

/** Reads prompts as the text encoder wants them. */
export class Tokenizer {
  /** @param json what tokenizer.json holds */
  constructor(json) {
    this.vocabulary = new Map(Object.entries(json.model.vocab));
    this.pieces = new Map([...this.vocabulary].map(([piece, number]) => [number, piece]));
    this.ranks = new Map(json.model.merges.map((pair, rank) => [pair.join(" "), rank]));
    this.length = json.truncation.max_length;
    [this.start, this.end] = ["<|startoftext|>", "<|endoftext|>"].map((mark) => this.vocabulary.get(mark));
  }

  /** The pieces of one word: its bytes, of which the last is marked, joined pair by pair in the order learned. */
  split(word) {
    const pieces = Array.from(new TextEncoder().encode(word), (byte) => CHARACTERS[byte]);
    pieces.push(`${pieces.pop()}</w>`);
    for (;;) {
      const ranks = pieces.slice(1).map((piece, place) => this.ranks.get(`${pieces[place]} ${piece}`) ?? Infinity);
      const best = Math.min(...ranks);
      if (best === Infinity) return pieces;
      const place = ranks.indexOf(best);
      pieces.splice(place, 2, pieces[place] + pieces[place + 1]);
    }
  }

  /** The numbers of a whole text, without beginning, end and limit. */
  numbers(text) {
    return text.split(MARKS).flatMap((part) => {
      if (MARKS.test(part)) return [this.vocabulary.get(part)];
      return words(part)
        .flatMap((word) => this.split(word))
        .map((piece) => this.vocabulary.get(piece));
    });
  }

  /** What the text encoder reads: beginning, at most 30 tokens, and the end until there are 32. */
  encode(text) {
    const kept = this.numbers(text).slice(0, this.length - 2);
    return [this.start, ...kept, ...Array(this.length - 1 - kept.length).fill(this.end)];
  }

  /** Numbers as text again. */
  decode(numbers) {
    const text = numbers.map((number) => this.pieces.get(number).replace("</w>", " ")).join("");
    const bytes = Array.from(text, (character) => (character === " " ? 32 : CHARACTERS.indexOf(character)));
    return new TextDecoder().decode(Uint8Array.from(bytes)).trim();
  }
}
