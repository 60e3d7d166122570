// What stands in the form: a prompt and three numbers.

import { check } from "./errors.js";

const form = document.getElementById("draw");
const FIELDS = ["prompt", "seed", "guidance", "steps"];

/** The settings to draw with. The worker checks the numbers. */
export function settings() {
  const [prompt, ...numbers] = FIELDS.map((name) => form.elements[name].value);
  const [seed, guidance, steps] = numbers.map((text) => (text.trim() === "" ? NaN : Number(text)));
  return { prompt, seed, guidance, steps };
}

/** Put a value into a field. Returns false, and changes nothing, where the field cannot hold it. */
function put(field, value) {
  const before = field.value;
  field.value = value.replace(/[\r\n]+/g, " ");
  const held = field.type === "text" || (field.value !== "" && Number(field.value) === Number(value));
  if (held && field.validity.valid) return true;
  field.value = before;
  return false;
}

/** Settings in the address, so that lessons can link to them: ?prompt=…&seed=…&guidance=…&steps=…
 *
 * Throws an InputError that names those that the form cannot hold; the others are taken.
 */
export function takeFromAddress(address) {
  const asked = [...new URL(address).searchParams].filter(([name]) => FIELDS.includes(name));
  const refused = asked.filter(([name, value]) => !put(form.elements[name], value));
  const named = refused.map(([name, value]) => {
    const { min, max, step } = form.elements[name];
    return `${name}=${value.slice(0, 30)} (here ${min} to ${max} in steps of ${step})`;
  });
  check(!named.length, `the address asks for ${named.join(" and ")}; what stands in the form is drawn instead`);
}
