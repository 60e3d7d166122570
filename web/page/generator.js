// PyTorch's generator of random numbers on the CPU, so that a seed draws here what it draws there.
// Mersenne Twister: Matsumoto and Nishimura 1998. Normal numbers: Box and Muller 1958, sixteen at a time.

const SIZE = 624;
const SHIFT = 397;

/** `torch.Generator().manual_seed(seed)` */
export class Generator {
  /** @param {number} seed a whole number from 0 to 4294967295 */
  constructor(seed) {
    this.state = new Uint32Array(SIZE);
    this.state[0] = seed;
    for (let place = 1; place < SIZE; place++) {
      const before = this.state[place - 1];
      this.state[place] = Math.imul(1812433253, before ^ (before >>> 30)) + place;
    }
    this.next = SIZE;
  }

  /** Renew the whole state, from which the next 624 numbers are read. */
  #twist() {
    const { state } = this;
    for (let place = 0; place < SIZE; place++) {
      const joined = (state[place] & 0x80000000) | (state[(place + 1) % SIZE] & 0x7fffffff);
      const turned = (joined >>> 1) ^ (joined & 1 ? 0x9908b0df : 0);
      state[place] = state[(place + SHIFT) % SIZE] ^ turned;
    }
    this.next = 0;
  }

  /** 32 random bits. */
  random() {
    if (this.next === SIZE) this.#twist();
    let bits = this.state[this.next++];
    bits ^= bits >>> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    return (bits ^ (bits >>> 18)) >>> 0;
  }

  /** A number from 0 to 1, 1 left out, with the 24 bits that a float holds. */
  uniform() {
    return (this.random() & 0xffffff) / 0x1000000;
  }

  /** Standard normal numbers, as `torch.randn(count)` draws them: a Float32Array. For a multiple of 16. */
  randn(count) {
    if (count % 16) throw new RangeError(`${count} is no multiple of 16; PyTorch draws others in another way`);
    const numbers = Float32Array.from({ length: count }, () => this.uniform());
    for (let block = 0; block < count; block += 16) {
      for (let place = block; place < block + 8; place++) {
        const radius = Math.sqrt(-2 * Math.log(1 - numbers[place])); // 1 - u: never the logarithm of 0
        const angle = 2 * Math.PI * numbers[place + 8];
        numbers[place] = radius * Math.cos(angle);
        numbers[place + 8] = radius * Math.sin(angle);
      }
    }
    return numbers;
  }
}
