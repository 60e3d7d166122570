// DPM-Solver++ of second order (Lu et al. 2022), with which Python draws, too: from noise to a picture in a few steps.

/** Half to the even side, as NumPy and PyTorch round. */
function round(number) {
  const low = Math.floor(number);
  if (number - low !== 0.5) return Math.round(number);
  return low % 2 ? low + 1 : low;
}

/** How much noise was mixed in at each of the timesteps that training knew: sigma is noise over signal. */
export function trainedSigmas({ num_train_timesteps: count, beta_start: first, beta_end: last }) {
  let kept = 1; // the share of the picture's variance that is left, in papers alpha-bar
  return Array.from({ length: count }, (_, timestep) => {
    const root = Math.sqrt(first) + ((Math.sqrt(last) - Math.sqrt(first)) * timestep) / (count - 1);
    kept *= 1 - root ** 2;
    return Math.sqrt((1 - kept) / kept);
  });
}

/** One drawing: the timesteps that it visits, and `step`, which goes from each to the next. */
export class Solver {
  /** @param config the model's scheduler_config.json  @param {number} steps how many timesteps are visited */
  constructor(config, steps) {
    const count = config.num_train_timesteps;
    const sigmas = trainedSigmas(config);
    const width = count - (count - count / steps); // rounded as np.arange does
    this.timesteps = Array.from({ length: steps }, (_, step) => round(count - step * width) - 1);
    this.sigmas = [...this.timesteps.map((timestep) => sigmas[timestep]), 0]; // at the end there is no noise
    this.place = 0;
    this.before = null; // the guess of the step before
  }

  /** From latents x with noise sigma, and the noise that the network sees in them, to less noise.
   *
   * Returns `guess`, the picture that the network has in mind, and `latents`, a part of the way there.
   */
  step(noise, x) {
    const [sigma, next] = [this.sigmas[this.place], this.sigmas[this.place + 1]];
    const signal = (level) => 1 / Math.sqrt(1 + level ** 2); // signal² + (signal · sigma)² = 1
    const guess = x.map((each, i) => each / signal(sigma) - sigma * noise[i]);
    const towards = this.#extrapolated(guess, sigma, next);
    const keep = (signal(next) * next) / (signal(sigma) * sigma); // of x; what is missing comes from the guess
    const add = signal(next) * (1 - next / sigma);
    const latents = x.map((each, i) => keep * each + add * towards[i]);
    this.before = guess;
    this.place += 1;
    return { guess, latents };
  }

  /** Second order: the guess moves from step to step, so aim where it will be half a step from now. */
  #extrapolated(guess, sigma, next) {
    if (!this.before || next === 0) return guess; // the first step knows no movement, the last ends at the guess
    const width = Math.log(sigma / next); // steps are measured in the logarithm of sigma
    const widthBefore = Math.log(this.sigmas[this.place - 1] / sigma);
    const share = width / widthBefore / 2;
    return guess.map((each, i) => each + share * (each - this.before[i]));
  }
}
