// Three small experiments on the prompt that stands in the form.

import { lit, pictureFigure } from "./pictures.js";

const GUIDANCES = [1, 2, 3, 5, 7.5, 10];

/** Every prompt that differs from this one in its colour, the colour before it was changed first. */
export function otherColours(prompt, colours) {
  const pattern = new RegExp(`\\b(${colours.join("|")})\\b`, "i");
  const found = prompt.match(pattern)?.[0].toLowerCase();
  if (!found) return null;
  return [found, ...colours.filter((colour) => colour !== found)].map((colour) => ({
    colour,
    prompt: prompt.replace(pattern, colour),
  }));
}

/** One after the other into a list. Returns false when it ends early, because something else was wished. */
async function inTurn(list, items, drawOne) {
  list.replaceChildren();
  for (const item of items) {
    const figure = await drawOne(item);
    if (!figure) return false;
    list.append(figure);
  }
  return true;
}

/** One seed, one prompt, guidance from 1 to 10. */
export function compareGuidance(list, settings, draw) {
  return inTurn(list, GUIDANCES, async (guidance) => {
    const made = await draw({ ...settings, guidance });
    return made && pictureFigure(made.pixels, `guidance ${guidance}`, `"${settings.prompt}" with guidance ${guidance}`);
  });
}

/** One seed, and a prompt in which one word is another. */
export function changeOneWord(list, settings, colours, draw) {
  const prompts =
    otherColours(settings.prompt, colours) ?? otherColours(`a photo of a ${colours[0]} butterfly`, colours);
  return inTurn(list, prompts, async ({ colour, prompt }) => {
    const made = await draw({ ...settings, prompt });
    return made && pictureFigure(made.pixels, colour, `"${prompt}", from the same noise`);
  });
}

/** The mean share of attention of each word at 8 × 8 places of the picture. */
export async function showLooks(list, settings, draw) {
  const made = await draw(settings);
  if (!made) return false;
  const { pixels, looked, pieces } = made;
  const tokens = looked.length / 64;
  list.replaceChildren(pictureFigure(pixels, "the picture"));
  pieces.forEach((piece, index) => {
    const shares = Float32Array.from({ length: 64 }, (_, place) => looked[place * tokens + index + 1]); // 0: beginning
    const most = `up to ${(100 * Math.max(...shares)).toFixed(1)} %`;
    list.append(
      pictureFigure(lit(pixels, shares), `${piece}, ${most}`, `${piece}: ${most} of the attention of a place`),
    );
  });
  return true;
}
