"""The flags that all three DreamBooth scripts of the guide have, and how a test gives them to a command."""

import ast
import re

NEEDED = {
    "pretrained_model_name_or_path": "miniature",
    "instance_data_dir": "meadow",
    "instance_prompt": "a photo of a sks butterfly",
}
CLASS = {"class_data_dir": "class", "class_prompt": "a photo of a butterfly"}

# flag: its type and default in train_dreambooth.py, train_dreambooth_lora.py and train_dreambooth_flax.py, and some
# other value to give it
IN_ALL_SCRIPTS = {
    "pretrained_model_name_or_path": (str, None, "a/model"),
    "revision": (str, None, "main"),
    "tokenizer_name": (str, None, "a/tokenizer"),
    "instance_data_dir": (str, None, "dog"),
    "class_data_dir": (str, None, "dogs"),
    "instance_prompt": (str, None, "a photo of sks dog"),
    "class_prompt": (str, None, "a photo of dog"),
    "with_prior_preservation": (bool, False, True),
    "prior_loss_weight": (float, 1.0, 0.5),
    "num_class_images": (int, 100, 200),
    "resolution": (int, 512, 768),
    "center_crop": (bool, False, True),
    "train_text_encoder": (bool, False, True),
    "train_batch_size": (int, 4, 1),
    "sample_batch_size": (int, 4, 8),
    "num_train_epochs": (int, 1, 3),
    "max_train_steps": (int, None, 400),
    "scale_lr": (bool, False, True),
    "adam_beta1": (float, 0.9, 0.5),
    "adam_beta2": (float, 0.999, 0.99),
    "adam_weight_decay": (float, 0.01, 0.1),
    "adam_epsilon": (float, 1e-08, 1e-06),
    "max_grad_norm": (float, 1.0, 0.5),
    "push_to_hub": (bool, False, True),
    "hub_token": (str, None, "hf_secret"),
    "hub_model_id": (str, None, "me/my-dog"),
    "logging_dir": (str, "logs", "diary"),
    "local_rank": (int, -1, 0),
}


def as_words(values: dict) -> list[str]:
    """Fields as the words of a command; True is a bare flag."""
    flags = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in values.items()]
    return [word for flag in flags for word in flag]


def table_of_script(reference: str, script: str) -> dict[str, tuple[type, object]]:
    """Type and default of each flag of a script, from the text of reference_flags.md."""
    kinds = {"flag": bool, "str": str, "int": int, "float": float, "str, nargs=+": list}
    section = reference.split(f"/{script} (")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `--(\w+)` \| (.+?) \| `(.*?)` \|", section, flags=re.MULTILINE)
    return {name: (kinds[kind], ast.literal_eval(default)) for name, kind, default in rows}
