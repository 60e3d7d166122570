// Pixels on the page: each picture is a canvas with words for those who do not see it.

export const SIDE = 64;

/** A canvas with a picture. @param {string} alt what is to be seen */
export function showPixels(canvas, pixels, alt) {
  canvas.width = SIDE;
  canvas.height = SIDE;
  canvas.getContext("2d").putImageData(new ImageData(pixels, SIDE, SIDE), 0, 0);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", alt);
}

/** An element with text. */
export function element(name, text = "", attributes = {}) {
  const made = Object.assign(document.createElement(name), { textContent: text });
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** A picture with a caption: a figure. */
export function pictureFigure(pixels, caption, alt = caption) {
  const figure = element("figure");
  const canvas = element("canvas");
  showPixels(canvas, pixels, alt);
  figure.append(canvas, element("figcaption", caption));
  return figure;
}

/** A picture in grey, lit where it was looked at. @param shares of 8 × 8 places; the most lit counts as 1 */
export function lit(pixels, shares) {
  const most = Math.max(...shares);
  return pixels.map((value, i) => {
    if (i % 4 === 3) return value;
    const place = Math.floor(i / 4);
    const [x, y] = [place % SIDE, Math.floor(place / SIDE)];
    const share = shares[Math.floor(y / 8) * 8 + Math.floor(x / 8)] / most;
    const [red, green, blue] = pixels.slice(place * 4, place * 4 + 3);
    const grey = 0.3 * red + 0.59 * green + 0.11 * blue;
    return (0.25 + 0.75 * share) * (0.6 * grey + 0.4 * [255, 220, 120][i % 4] * share);
  });
}
