"""The networks in JAX give what PyTorch gives on the same weights, forward and backward; their folders are the same.

The relative error of an array is its largest deviation over the largest value of the other: max|a - b| / max|b|.
"""
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax", reason="JAX is not installed: pip install 'diffusion-lessons[jax]'")
pytest.importorskip("flax", reason="Flax is not installed: pip install 'diffusion-lessons[jax]'")

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_lessons import miniature
from diffusion_lessons.engine.checkpoints import load_part, without_warnings
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.jax.folder import PARTS, StoredWeights, read_folder, read_part, write_folder
from diffusion_lessons.jax.layers import relative_error, stored_name, to_torch, weights_of
from diffusion_lessons.stable_diffusion.folder import load_pipeline, weight_files

LIMIT = 1e-4
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
# The published configurations with fewer channels; what is left out has the same default there and here.
UNET = dict(block_out_channels=(16, 32, 64, 64), norm_num_groups=4, sample_size=16, cross_attention_dim=24)
VAE = dict(
    block_out_channels=(16, 32, 32, 32), down_block_types=["DownEncoderBlock2D"] * 4, norm_num_groups=4,
    up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, scaling_factor=0.18215,
)  # fmt: skip
TEXT = dict(
    vocab_size=99, hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=77, bos_token_id=97, eos_token_id=98, pad_token_id=1,
)  # fmt: skip
REDUCED = {
    "sd-1.4": {
        "unet": UNET | dict(attention_head_dim=8),
        "vae": VAE,
        "text_encoder": TEXT | dict(hidden_act="quick_gelu"),
    },
    "sd-2.1": {
        # one layer in a block is enough here: two are compiled for 1.4, and compiling is what these tests spend
        "unet": UNET | dict(attention_head_dim=[2, 4, 8, 8], use_linear_projection=True, upcast_attention=True,
                            layers_per_block=1),
        "vae": VAE,
        "text_encoder": TEXT | dict(hidden_act="gelu", num_hidden_layers=3),
    },
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """What is compiled here runs once: compiling well would take longer than it saves."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def built(name: str, config: dict) -> torch.nn.Module:
    """A network with random weights; norms and biases, too, so that none of them can stand in for another."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = CLASSES[name]
        network = kind(CLIPTextConfig(**config)) if kind is CLIPTextModel else kind(**config)
        with torch.no_grad():
            for weight in network.parameters():
                if weight.ndim == 1:
                    weight.add_(0.1 * torch.randn(weight.shape))
    return network.eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each network in PyTorch and in JAX, by model and part; JAX reads what PyTorch wrote."""
    made = {}

    def pair(model: str, name: str):
        if (model, name) not in made:
            if model == "miniature":
                folder = miniature.path() / name
                torch_network = load_part(CLASSES[name], folder, "").eval()
            else:
                folder = tmp_path_factory.mktemp(model) / name
                torch_network = built(name, REDUCED[model][name])
                with without_warnings():
                    torch_network.save_pretrained(folder)
            made[model, name] = torch_network, read_part(folder)
        return made[model, name]

    return pair


def channels_last(value: torch.Tensor) -> np.ndarray:
    """What a network in JAX takes and gives where PyTorch has this."""
    value = value.detach()
    return (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).numpy()


def in_jax(values):
    return [[channels_last(each) for each in value] if isinstance(value, list) else
            channels_last(value) if isinstance(value, torch.Tensor) else value for value in values]  # fmt: skip


def compiled(network):
    """A network as one program instead of one for each operation."""
    structure, state = nnx.split(network)
    forward = jax.jit(lambda state, *inputs: nnx.merge(structure, state)(*inputs))
    return partial(forward, state)


# In exact arithmetic these gradients are zero: the same vector added to all keys changes no softmax.
NO_GRADIENT = ("k_proj.bias", "to_k.bias")


def compare(torch_network, jax_network, inputs, torch_call=None, jax_call=None) -> None:
    """Forward, and the gradients of a random weighting of the outputs by inputs and by parameters."""
    torch_call, jax_call = torch_call or torch_network, jax_call or (lambda network, *inputs: network(*inputs))
    inputs = [value.detach().clone().requires_grad_(value.is_floating_point()) if isinstance(value, torch.Tensor)
              else value for value in inputs]  # fmt: skip
    outputs = torch_call(*inputs)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    generator = torch.Generator().manual_seed(2)
    weighting = [torch.randn(each.shape, generator=generator) for each in outputs]
    torch_network.zero_grad()
    sum((each * weight).sum() for each, weight in zip(outputs, weighting, strict=True)).backward()

    structure, state = nnx.split(jax_network)
    given = in_jax(inputs)
    which = [n for n, value in enumerate(inputs) if isinstance(value, torch.Tensor) and value.is_floating_point()]

    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(state, floats):
        values = list(given)
        for n, value in zip(which, floats, strict=True):
            values[n] = value
        found = jax_call(nnx.merge(structure, state), *values)
        found = list(found) if isinstance(found, list | tuple) else [found]
        return sum((each * weight).sum() for each, weight in zip(found, in_jax(weighting), strict=True)), found

    (_, found), (by_weights, by_inputs) = jax.jit(loss)(state, [given[n] for n in which])
    assert len(found) == len(outputs)
    errors = {f"output {n}": relative_error(a, b) for n, (a, b) in enumerate(zip(found, in_jax(outputs), strict=True))}
    for n, gradient in zip(which, by_inputs, strict=True):
        wanted = inputs[n].grad  # None for the words, in a block that does not attend
        error = abs(np.asarray(gradient)).max() if wanted is None else relative_error(gradient, channels_last(wanted))
        errors[f"gradient by input {n}"] = error
    expected = {name: weight.grad for name, weight in torch_network.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for path, gradient in nnx.to_flat_state(by_weights):
        name, gradient = stored_name(path), to_torch(path[-1], np.asarray(gradient[...]))
        wanted = expected.pop(name)
        if wanted is None:  # encode or decode alone uses half of the network
            errors[f"gradient by {name}"] = abs(gradient).max()
        elif name.endswith(NO_GRADIENT):
            errors[f"gradient by {name}"] = max(abs(gradient).max(), wanted.abs().max()) / largest
        else:
            errors[f"gradient by {name}"] = relative_error(gradient, wanted)
    assert not expected, f"weights that JAX lacks: {sorted(expected)}"
    worst = max(errors, key=errors.get)
    assert errors[worst] <= LIMIT, f"{worst}: {errors[worst]:.1e}"


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare_whole(model: str, name: str, torch_network, jax_network, size: int = 16) -> None:
    config = torch_network.config
    if name == "text_encoder":
        ids = torch.randint(0, config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
        compare(torch_network, jax_network, [ids], lambda ids: torch_network(ids).last_hidden_state)
    elif name == "unet":
        inputs = [normal(2, 4, size, size), torch.tensor([3, 977]), normal(2, 7, config.cross_attention_dim)]
        compare(torch_network, jax_network, inputs, lambda *inputs: torch_network(*inputs).sample)
    else:
        pictures = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(1)) * 2 - 1

        def encode(pictures):
            moments = torch_network.encode(pictures).latent_dist
            return moments.mean, moments.logvar

        compare(torch_network, jax_network, [pictures], encode, lambda network, x: network.encode(x))
        compare(torch_network, jax_network, [normal(2, 4, 6, 4)], lambda x: torch_network.decode(x).sample,
                lambda network, x: network.decode(x))  # fmt: skip


@pytest.mark.parametrize(("model", "name"), [
    (model, name) for model in ("miniature", *REDUCED) for name in CLASSES
    if (model, name) != ("sd-2.1", "vae")  # the same as 1.4's
])  # fmt: skip
def test_whole_networks_are_those_of_pytorch(pairs, model, name):
    compare_whole(model, name, *pairs(model, name))


TIME, WORDS = normal(2, 64), normal(2, 7, 24, seed=3)
# Blocks of the reduced Stable Diffusion 1.4: part, where it is, and what goes in.
BLOCKS = {
    "ResnetBlock2D": ("unet", "down_blocks.1.resnets.0", [normal(2, 16, 6, 6), TIME]),
    "TimestepEmbedding": ("unet", "time_embedding", [normal(2, 16)]),
    "Attention, to itself": ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1", [normal(2, 9, 64)]),
    "Attention, to words": ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2", [normal(2, 9, 64), WORDS]),
    "FeedForward": ("unet", "mid_block.attentions.0.transformer_blocks.0.ff", [normal(2, 9, 64)]),
    "BasicTransformerBlock": ("unet", "mid_block.attentions.0.transformer_blocks.0", [normal(2, 9, 64), WORDS]),
    "Transformer2DModel": ("unet", "down_blocks.0.attentions.0", [normal(2, 16, 4, 6), WORDS]),
    "Downsample2D": ("unet", "down_blocks.0.downsamplers.0", [normal(2, 16, 6, 5)]),
    "Upsample2D": ("unet", "up_blocks.0.upsamplers.0", [normal(2, 64, 3, 4), (5, 8)]),
    "CrossAttnDownBlock2D": ("unet", "down_blocks.1", [normal(2, 16, 6, 6), TIME, WORDS]),
    "DownBlock2D": ("unet", "down_blocks.3", [normal(2, 64, 4, 4), TIME, WORDS]),
    "UNetMidBlock2DCrossAttn": ("unet", "mid_block", [normal(2, 64, 4, 4), TIME, WORDS]),
    "UpBlock2D": ("unet", "up_blocks.0", [normal(2, 64, 2, 2), [normal(2, 64, 2, 2)] * 3, TIME, WORDS]),
    "CrossAttnUpBlock2D": (
        "unet", "up_blocks.2",
        [normal(2, 64, 4, 4), [normal(2, 16, 4, 4), normal(2, 32, 4, 4), normal(2, 32, 4, 4)], TIME, WORDS]),
    "DownEncoderBlock2D": ("vae", "encoder.down_blocks.0", [normal(2, 16, 6, 6)]),
    "UpDecoderBlock2D": ("vae", "decoder.up_blocks.2", [normal(2, 32, 4, 4)]),
    "UNetMidBlock2D": ("vae", "encoder.mid_block", [normal(2, 32, 4, 4)]),
    "CLIPEncoderLayer": ("text_encoder", "encoder.layers.1", [normal(2, 7, 24)]),
}  # fmt: skip


def part_of(network, path: str):
    for word in path.split("."):
        network = network[int(word)] if word.isdigit() else getattr(network, word)
    return network


def torch_call_of(kind: str, block, path: str):
    """How PyTorch calls a block whose arguments differ from those in JAX."""
    if kind == "Upsample2D":
        return lambda x, size: block(x, output_size=size)
    if kind == "Transformer2DModel":
        return lambda x, words: block(x, words, return_dict=False)[0]
    if kind == "BasicTransformerBlock":
        return lambda x, words: block(x, encoder_hidden_states=words)
    if kind == "DownBlock2D":
        return lambda x, time, words: block(x, time)[1]
    if kind == "CrossAttnDownBlock2D":
        return lambda x, time, words: block(x, time, encoder_hidden_states=words)[1]
    if kind == "UNetMidBlock2DCrossAttn":
        return lambda x, time, words: block(x, time, encoder_hidden_states=words)
    if kind == "UpBlock2D":
        return lambda x, skips, time, words: block(x, tuple(skips), time, upsample_size=(4, 4))
    if kind == "CrossAttnUpBlock2D":
        return lambda x, skips, time, words: block(x, tuple(skips), time, words, upsample_size=(8, 8))
    if kind == "CLIPEncoderLayer":
        mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
        return lambda x: block(x, mask)
    return None


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_those_of_pytorch(pairs, kind):
    part, path, inputs = BLOCKS[kind]
    torch_network, jax_network = pairs("sd-1.4", part)
    block, jax_block = part_of(torch_network, path), part_of(jax_network, path)
    call = torch_call_of(kind, block, path)
    if "UpBlock" in kind:  # one more skip stays for the block above, and says the size
        size = 4 if kind == "UpBlock2D" else 8
        stays = np.zeros((2, size, size, 1), np.float32)
        skips = inputs[1]

        def up(network, x, time, words):
            return network(x, [stays, *in_jax([skips])[0]], time, words)

        compare(block, jax_block, [inputs[0], *inputs[2:]], lambda x, *rest: call(x, skips, *rest), up)
    else:
        compare(block, jax_block, inputs, call)


@pytest.mark.parametrize("size", [(15, 10)])
def test_any_size_of_latents_goes_through_the_unet(pairs, size):
    """Odd sizes are halved upwards on the way down, and cut on the way up, as diffusers does."""
    network, jax_network = pairs("miniature", "unet")
    latents, timesteps, words = normal(1, 4, *size), torch.tensor([500]), normal(1, 7, 128)
    with torch.no_grad():
        expected = network(latents, timesteps, words).sample
    found = compiled(jax_network)(channels_last(latents), timesteps.numpy(), words.numpy())
    assert relative_error(found, channels_last(expected)) <= LIMIT


def test_a_network_in_bfloat16_keeps_its_weights_in_float32(pairs):
    network, _ = pairs("miniature", "unet")
    half = read_part(miniature.path() / "unet", dtype=jnp.bfloat16)
    assert {str(variable.dtype) for _, variable in nnx.to_flat_state(nnx.state(half))} == {"float32"}
    latents, timesteps, words = normal(1, 4, 8, 8), torch.tensor([500]), normal(1, 7, 128)
    with torch.no_grad():
        expected = network(latents, timesteps, words).sample
    found = compiled(half)(channels_last(latents), timesteps.numpy(), words.numpy())
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(found.astype(jnp.float32), channels_last(expected)) < 0.05


def test_rematerialisation_changes_no_number(pairs):
    """Shown on the middle of the UNet; that the flag reaches every block, on the program of the whole."""
    _, network = pairs("miniature", "unet")
    again = read_part(miniature.path() / "unet", remat=True)
    picture, time, words = channels_last(normal(1, 128, 4, 4)), normal(1, 256).numpy(), normal(1, 7, 128).numpy()
    found = []
    for each in (network.mid_block, again.mid_block):
        structure, state = nnx.split(each)
        gradient = jax.grad(lambda state, s=structure: (nnx.merge(s, state)(picture, time, words) ** 2).sum())
        found.append(jax.jit(gradient)(state))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-4 * float(abs(a).max()))
    structure, state = nnx.split(again)
    inputs = channels_last(normal(1, 4, 8, 8)), np.array([500]), words
    text = str(jax.make_jaxpr(lambda state: nnx.merge(structure, state)(*inputs))(state))
    assert len(re.findall(r"\b(?:remat|checkpoint)\d*\[", text)) == sum(UNET_LAYERS.values())


# Residual blocks and transformers of the miniature's UNet, each of which is computed again.
UNET_LAYERS = {"resnets": 3 + 2 + 6, "attentions": 2 + 1 + 4}


# ── folders ──────────────────────────────────────────────────────────────────────────────


def test_what_is_read_and_written_is_what_was_there(tmp_path):
    model = read_folder("miniature")
    write_folder(model, tmp_path / "first", list(PARTS))
    first, original = load_pipeline(tmp_path / "first"), load_pipeline(miniature.path())
    with without_warnings():
        plain = StableDiffusionPipeline.from_pretrained(tmp_path / "first")
    for name in PARTS:
        wanted = getattr(original, name).state_dict()
        for pipeline in (first, plain):
            found = getattr(pipeline, name).state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), "every value, exactly"
    assert type(plain.scheduler) is type(original.scheduler)
    write_folder(read_folder(tmp_path / "first"), tmp_path / "second", list(PARTS))
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert any("tokenizer" in str(path) for path in files)
    for path in files:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes(), path


def test_only_what_was_trained_is_written_anew(tmp_path):
    model = read_folder("miniature")
    model.unet.conv_out.bias[...] = model.unet.conv_out.bias[...] + 1
    (tmp_path / "empty").mkdir()
    write_folder(model, tmp_path / "empty")
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for path in (miniature.path() / part).iterdir():
            assert (tmp_path / "empty" / part / path.name).read_bytes() == path.read_bytes()
    before, after = (load_pipeline(folder).unet.conv_out.bias for folder in (miniature.path(), tmp_path / "empty"))
    assert torch.equal(after, before + 1)
    with pytest.raises(InputError, match="holds something already; name a new folder"):
        write_folder(model, tmp_path / "empty")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the miniature to be changed."""
    shutil.copytree(miniature.path(), tmp_path / "model", ignore=shutil.ignore_patterns("clip"))
    return tmp_path / "model"


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def same_weights(found, name: str) -> bool:
    wanted = read_part(miniature.path() / name)
    ours, theirs = weights_of(found), weights_of(wanted)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_weights_in_several_files_and_of_a_variant(folder, tmp_path):
    with without_warnings():
        unet = load_part(UNet2DConditionModel, folder / "unet", "")
        shutil.rmtree(folder / "unet")
        unet.half().save_pretrained(folder / "unet", max_shard_size="3MB", variant="fp16")
    for name in ("vae", "text_encoder"):
        file = next((folder / name).glob("*.safetensors"))
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert len(weight_files(folder / "unet", "fp16")) > 2
    with pytest.raises(InputError, match="add --variant fp16"):
        read_folder(folder)
    model = read_folder(folder, variant="fp16")
    assert same_weights(model.unet, "unet") and same_weights(model.text_encoder, "text_encoder")
    write_folder(model, tmp_path / "written")
    assert same_weights(read_folder(tmp_path / "written").autoencoder, "vae"), "copied, without the variant"
    load_pipeline(tmp_path / "written")


def test_weights_in_bfloat16_and_names_of_older_days(folder):
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    ids = {"text_model.embeddings.position_ids": torch.arange(32)[None]}
    save_file({name: weight.bfloat16() for name, weight in state.items()} | ids, file)
    found, exact = (weights_of(read_part(each / "text_encoder")) for each in (folder, miniature.path()))
    assert found.keys() == exact.keys()
    assert all(np.array_equal(found[key], torch.tensor(exact[key]).bfloat16().float().numpy()) for key in exact)
    save_file({name.removeprefix("text_model."): weight for name, weight in state.items()}, file)
    assert same_weights(read_part(folder / "text_encoder"), "text_encoder"), "some versions of transformers"


def test_a_vae_with_the_old_names_of_its_attention(pairs, tmp_path):
    """As the one of Stable Diffusion 1.4 on the Hub has them."""
    network, wanted = pairs("sd-1.4", "vae")
    with without_warnings():
        network.save_pretrained(tmp_path / "vae")
    file = next((tmp_path / "vae").glob("*.safetensors"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, name in old.items():
        state = {key.replace(f".attentions.0.{new}.", f".attentions.0.{name}."): value for key, value in state.items()}
    assert any("proj_attn" in name for name in state)
    save_file(state, file)
    found, wanted = weights_of(read_part(tmp_path / "vae")), weights_of(wanted)
    assert found.keys() == wanted.keys() and all(np.array_equal(found[key], wanted[key]) for key in wanted)


NOT_SERVED = [
    ("unet", "class_embed_type", "timestep"),
    ("unet", "act_fn", "gelu"),
    ("unet", "down_block_types", ["AttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]),
    ("unet", "up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
    ("unet", "mid_block_type", None),
    ("unet", "transformer_layers_per_block", 2),
    ("unet", "layers_per_block", [1, 2, 2]),
    ("unet", "attention_head_dim", 5),
    ("unet", "norm_num_groups", 24),
    ("unet", "num_attention_heads", 4),
    ("unet", "dropout", 0.1),
    ("unet", "an_option_of_tomorrow", True),
    ("vae", "act_fn", "mish"),
    ("vae", "latents_mean", [0.0, 0.0, 0.0, 1.0]),
    ("vae", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
    ("text_encoder", "hidden_act", "relu"),
    ("text_encoder", "attention_dropout", 0.1),
]


@pytest.mark.parametrize(("part", "option", "value"), NOT_SERVED)
def test_what_is_not_served_is_refused_by_name(folder, part, option, value):
    edit(folder / part / "config.json", **{option: value})
    with pytest.raises(InputError) as error:
        read_part(folder / part)
    assert option in str(error.value) and "in JAX" in str(error.value) and "\n" not in str(error.value)


def test_options_that_ask_for_nothing_are_no_matter(folder):
    edit(folder / "unet" / "config.json", an_option_of_tomorrow=None, upcast_attention=True, sample_size=99)
    edit(folder / "text_encoder" / "config.json", top_k=50, num_beams=1)
    assert same_weights(read_part(folder / "unet"), "unet")
    read_part(folder / "text_encoder")


def test_bad_folders_are_answered_with_one_line(folder, tmp_path):
    def refused(name, *said):
        with pytest.raises(InputError) as error:
            read_folder(name)
        assert all(word in str(error.value) for word in said), str(error.value)
        assert "\n" not in str(error.value)

    refused(tmp_path / "nowhere", "nowhere")
    edit(folder / "unet" / "config.json", block_out_channels=[32, 64, 128])
    refused(folder, "unet", "of shape", "config.json")
    edit(folder / "unet" / "config.json", block_out_channels="wide")
    refused(folder, "unet", "block_out_channels")
    shutil.copyfile(miniature.path() / "unet" / "config.json", folder / "unet" / "config.json")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({name: weight for name, weight in state.items() if name != "conv_in.bias"}, file)
    refused(folder, "has no weight conv_in.bias")
    save_file(state | {"add_embedding.linear_1.bias": torch.zeros(3)}, file)
    refused(folder, "add_embedding.linear_1.bias", "no layer")
    file.write_bytes(file.read_bytes()[:-5])
    refused(folder, "unet", "cut off")


def test_old_flax_weights_are_refused_with_what_takes_their_place(folder):
    for name in ("unet", "vae", "text_encoder"):
        file = next((folder / name).glob("*.safetensors"))
        file.rename(folder / name / "diffusion_flax_model.msgpack")
    for name in (folder, "duongna/stable-diffusion-v1-4-flax"):
        with pytest.raises(InputError, match=r"msgpack.*safetensors.*CompVis/stable-diffusion-v1-4$"):
            read_folder(name)


def test_weights_are_read_one_at_a_time():
    with StoredWeights(weight_files(miniature.path() / "unet")) as weights:
        assert len(weights) == len(set(weights)) > 100
        assert weights["conv_in.weight"].dtype == np.float32


@pytest.mark.slow
def test_the_unet_of_stable_diffusion_1_4_at_full_width(tmp_path):
    """860 million weights, forward at a small size: three copies of 3.4 GB at most."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64).eval()
    assert sum(weight.numel() for weight in network.parameters()) == 859_520_964
    network.save_pretrained(tmp_path / "unet")
    latents, timesteps, words = normal(1, 4, 8, 8), torch.tensor([500]), normal(1, 77, 768)
    with torch.no_grad():
        expected = channels_last(network(latents, timesteps, words).sample)
    del network
    found = compiled(read_part(tmp_path / "unet"))(channels_last(latents), timesteps.numpy(), words.numpy())
    assert relative_error(found, expected) <= LIMIT
