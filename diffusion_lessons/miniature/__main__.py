"""`python -m diffusion_lessons.miniature STAGE`: train one part of the miniature, assemble or measure it."""

from diffusion_lessons.miniature.stages import main

if __name__ == "__main__":
    raise SystemExit(main())
