"""`python -m diffusion_lessons.butterflies`: the command `train-butterflies`, also under `accelerate launch -m`."""

from diffusion_lessons.butterflies.training import main

if __name__ == "__main__":
    raise SystemExit(main())
