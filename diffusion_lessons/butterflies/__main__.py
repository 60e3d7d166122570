"""`python -m diffusion_lessons.butterflies`: the command `train-butterflies`, also under `accelerate launch -m`."""

from diffusion_lessons.butterflies.config import train_butterflies

if __name__ == "__main__":
    raise SystemExit(train_butterflies())
