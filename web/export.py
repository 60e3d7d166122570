"""The miniature's networks as ONNX graphs without weights, and what they answer in PyTorch.

    python web/export.py FOLDER

writes into FOLDER `text_encoder.onnx`, `unet.onnx` and `vae_decoder.onnx`, a few hundred kilobytes in all. Every
weight in them is a place in the safetensors file that the package ships: there is no second copy, and nothing that
could differ from what Python loads. The files hold 16 bits a number and the graphs reckon in 32, so the places are
those of the widened data: twice the offset of the tensor. `page/safetensors.js` widens in the same way.
"""
import argparse
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from diffusion_lessons import miniature
from diffusion_lessons.miniature.model import WatchedAttention
from diffusion_lessons.stable_diffusion.prompts import tokenize

OPSET = 20


class TextEncoder(nn.Module):
    """Token numbers, int64 (1, 32), to what the UNet reads of them: (1, 32, width)."""

    inputs, outputs = ("tokens",), ("context",)

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        super().__init__()
        self.network = pipeline.text_encoder

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return (self.network(tokens)[0],)


class UNet(nn.Module):
    """Latents (1, 4, h, w), a timestep (1,) and a context to the predicted noise, and where each token was looked at.

    The further outputs are the softmaxes of the cross-attentions in their order: (1, heads, places, tokens).
    """

    inputs = ("latents", "timestep", "context")

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        super().__init__()
        self.network = pipeline.unet
        watched = [name for name in self.network.attn_processors if ".attn2." in name]
        self.outputs = ("noise", *(f"attention.{place}" for place in range(len(watched))))

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        watched, before = WatchedAttention(), dict(self.network.attn_processors)
        self.network.set_attn_processor({name: watched if ".attn2." in name else each for name, each in before.items()})
        try:
            noise = self.network(latents, timestep, context, return_dict=False)[0]
        finally:
            self.network.set_attn_processor(before)
        return (noise, *watched.maps)


class VAEDecoder(nn.Module):
    """Scaled latents (1, 4, h, w) to a picture from -1 to 1: (1, 3, 4h, 4w)."""

    inputs, outputs = ("latents",), ("picture",)

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        super().__init__()
        self.network = pipeline.vae

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (self.network.decode(latents / self.network.config.scaling_factor, return_dict=False)[0],)


class Part(NamedTuple):
    """A network to export: its module, what it is asked, and the package's file of its weights."""

    module: nn.Module
    example: tuple[Tensor, ...]
    weights: Path


def parts(pipeline: StableDiffusionPipeline) -> dict[str, Part]:
    """The three networks by the names of their graphs. The examples are noise of seed 0 and a caption."""
    folder, side = miniature.path(), pipeline.unet.config.sample_size
    tokens = tokenize(pipeline.tokenizer, ["a photo of a red butterfly on snow"])
    latents = torch.randn(1, pipeline.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = pipeline.text_encoder(tokens)[0]
    return {
        "text_encoder": Part(TextEncoder(pipeline), (tokens,), folder / "text_encoder/model.safetensors"),
        "unet": Part(UNet(pipeline), (latents, torch.tensor([499.0]), context),
                     folder / "unet/diffusion_pytorch_model.safetensors"),
        "vae_decoder": Part(VAEDecoder(pipeline), (latents,), folder / "vae/diffusion_pytorch_model.safetensors"),
    }


def widened_places(file: Path) -> dict[str, tuple[int, int]]:
    """Each tensor's first byte and length in the file's data, were its numbers of 16 bits written in 32."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    formats = {entry["dtype"] for entry in header.values()}
    if formats != {"F16"}:
        raise SystemExit(f"{file}: holds {', '.join(sorted(formats))}; the page widens weights of 16 bits (F16)")
    return {name: (2 * first, 2 * (end - first)) for name, (first, end) in
            ((name, entry["data_offsets"]) for name, entry in header.items())}


def without_weights(graph: ir.Graph, places: Mapping[str, tuple[int, int]], location: str) -> None:
    """Replace every weight in a graph by its place; raises SystemExit for one that the file does not have."""
    for value in graph.initializers.values():
        name = value.name.removeprefix("network.")
        place = places.get(name) or places.get(f"text_model.{name}")
        tensor = value.const_value
        if place is None and tensor.dtype == ir.DataType.FLOAT:
            raise SystemExit(f"{location}: the graph has a weight {name!r} that the file has not")
        if place is not None:
            first, length = place
            value.const_value = ir.ExternalTensor(location, first, length, tensor.dtype, shape=tensor.shape,
                                                  name=value.name)


def export_part(name: str, part: Part, folder: Path) -> Path:
    """Write one graph; returns its file. Its weights lie in a file that is called as the graph is, with `.f32`."""
    # Optimised, it would hold folded and turned copies of weights; the runtime does that when it loads the graph.
    program = torch.onnx.export(part.module.eval(), part.example, dynamo=True, opset_version=OPSET, optimize=False,
                                verbose=False, input_names=part.module.inputs, output_names=part.module.outputs)
    model = program.model
    without_weights(model.graph, widened_places(part.weights), f"{name}.f32")
    for node in model.graph:
        node.metadata_props.clear()  # the exporter's traces: four fifths of the file, with paths of this machine
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    path = folder / f"{name}.onnx"
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))
    return path


def answers(part: Part) -> dict[str, Any]:
    """What the network answers to its example in PyTorch: flat lists of numbers, by the names of in- and outputs."""
    with torch.no_grad():
        made = part.module(*part.example)
    said = dict(zip(part.module.inputs, part.example, strict=True)) | dict(zip(part.module.outputs, made, strict=True))
    return {name: value.flatten().tolist() for name, value in said.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts(miniature.load()).items():
        path = export_part(name, part, folder)
        (folder / f"{name}.answers.json").write_text(json.dumps(answers(part)))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
