"""Vectors drawn from a generator network: sample n is a function of (weights, seed, n), whoever draws it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines import storage
from pipelines.corpora import Slice, Survey
from pipelines.corpora._vector_arrays import Array, Block, Blocks, Needed, Unreadable
from pipelines.corpora._vector_settings import VectorSettings
from pipelines.corpora._vector_torch import tensors_in
from pipelines.errors import Refused
from vqcore import noise
from vqcore.networks.dcgan import DCGANGenerator
from vqcore.networks.mapping import MappingNetwork

BATCH = 64
"""Samples of one forward pass, always so many: the bits of a row must not depend on who else is in its batch."""
SLICE_SAMPLES = 16 * BATCH
GENERATORS: dict[str, tuple[Any, Callable[[Any], int]]] = {
    "dcgan": (DCGANGenerator, lambda network: 1),
    "stylegan2_mapping": (MappingNetwork, lambda network: network.num_layers),
}
"""Name -> network, and the layer that is kept where none is set."""
FIRST = {"dcgan": ("main.0.weight",), "stylegan2_mapping": ("fc0.weight", "style.1.weight")}
"""What the first weight is called: by it the network is found among others in one file."""


class Networks:
    """The network that the slices of a process share, loaded by the first of them."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[nn.Module, int]] = {}

    def get(self, uri: str, settings: VectorSettings) -> tuple[Any, int]:
        """(network on its device, number of the layer that is kept).

        Raises:
            Refused: the file does not hold such a network.
        """
        if uri not in self.held:
            self.held[uri] = _loaded(uri, settings)
        return self.held[uri]


def survey_draws(sources: list[str], settings: VectorSettings) -> Survey:
    """The samples to draw. The weights are loaded, so that what does not fit is refused before work begins.

    Raises:
        Refused: not one file of weights, or not of this network.
    """
    entries = [entry for source in sources for entry in storage.list_files(source)]
    if len(entries) != 1:
        raise Refused(
            f"generator={settings.generator} takes one file of weights as its source (.pt, .pth or .safetensors); "
            f"{len(entries)} files were given."
        )
    entry = entries[0]
    network, layer = _loaded(entry.uri, settings)
    made = _kept(network, layer, 0, settings)
    places, dim = made.shape[1:]
    samples_as_rows = settings.rows == "samples" and settings.pool == "positions" and settings.position is None
    if settings.position is not None and settings.position >= places:
        raise Refused(
            f"position={settings.position} was given; layer {layer} has {places} positions (with pool=positions)."
        )
    each = 1 if samples_as_rows or settings.position is not None else places
    if settings.dim not in (None, dim):
        raise Refused(f"layer {layer} of {entry.name} gives vectors of {dim}, but {settings.dim} was asked for.")
    slices = []
    for low in range(0, settings.samples, SLICE_SAMPLES):
        high = min(low + SLICE_SAMPLES, settings.samples)
        size = (high - low) * math.prod(made.shape[1:]) * settings.stored.itemsize
        slices.append(Slice(entry.uri, entry.name, low * each, high * each, size, {"draws": low, "each": each}))
    sha256 = storage.sha256_of_file(storage.local_copy(entry.uri))
    context = {"generator": settings.generator, "layer": layer, "weights": sha256}
    found = {"dim": dim, "positions": places if samples_as_rows else None}
    return Survey(slices, context, settings=found)


def read_draws(uri: str, start: int, stop: int, settings: VectorSettings, networks: Networks, needed: Needed) -> Blocks:
    """Samples [start, stop) that are needed, [n, L, D]; `start` is a multiple of BATCH."""
    network, layer = networks.get(uri, settings)
    for low in range(start, stop, BATCH):
        high = min(low + BATCH, stop)
        if needed(low, high):
            yield Block(low, _kept(network, layer, low, settings)[: high - low])


def _kept(network: Any, layer: int, first: int, settings: VectorSettings) -> Array:
    """The kept layer's output for samples [first, first + BATCH): [BATCH, positions, D] float32."""
    keys = torch.arange(first, first + BATCH)
    z = noise.normal(settings.seed, 0, keys, draws=network.latent_dim).float()
    with torch.inference_mode():
        made: Tensor = network.features(z.to(settings.device), layer)
    maps = made.flatten(2) if made.ndim > 2 else made[:, :, None]
    if settings.pool == "mean":
        maps = maps.mean(2, keepdim=True)
    return np.ascontiguousarray(maps.transpose(1, 2).cpu().numpy())


def _loaded(uri: str, settings: VectorSettings) -> tuple[Any, int]:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise Refused("device=cuda was given, but this machine has no CUDA device; use device=cpu.")
    kind, default = GENERATORS[settings.generator or ""]
    state = _state(uri, settings)
    try:
        network = kind.shaped_like(state)
        wanted = network.state_dict()
        # The counter of batch norm has no say in evaluation, and safetensors of older tools lack it.
        lacking = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking[:3])}")
        network.load_state_dict({name: state.get(name, value) for name, value in wanted.items()})
    except (ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[-1].strip()
        raise Refused(f"{uri} does not hold the weights of generator={settings.generator}: {said}.") from None
    layer = settings.layer or default(network)
    if layer > network.num_layers:
        raise Refused(f"layer={layer} was given, but this {settings.generator} has layers 1 to {network.num_layers}.")
    return network.eval().requires_grad_(False).to(settings.device), layer


def _state(uri: str, settings: VectorSettings) -> dict[str, Tensor]:
    """The weights of the one network of this kind in the file, under the names our network has."""
    tensors = _tensors(uri)
    names = FIRST[settings.generator or ""]
    heads = [
        name.removesuffix(first)
        for name in tensors
        for first in names
        if name.endswith(first) and name.removesuffix(first)[-1:] in ("", ".") and name.startswith(settings.key or "")
    ]
    if len(heads) != 1:
        among = f" whose name begins with key={settings.key}" if settings.key else ""
        what = f"{len(heads)} networks ({', '.join(heads)}); set key= to how one begins" if heads else "no such network"
        raise Refused(f"{uri} holds {what}{among}: generator={settings.generator} looks for one {' or '.join(names)}.")
    state = {name.removeprefix(heads[0]): tensor for name, tensor in tensors.items() if name.startswith(heads[0])}
    if "embed.weight" in state:
        raise Refused(f"{uri} is a mapping network with class labels; only those without are drawn from.")
    return _as_ours(state)


def _as_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """rosinality's StyleGAN2 calls the layers style.1 to style.8, after the norm that is style.0."""
    if "style.1.weight" not in state:
        return dict(state)
    parts = {name: name.split(".") for name in state if name.startswith("style.")}
    return {f"fc{int(part[1]) - 1}.{part[2]}": state[name] for name, part in parts.items() if part[1].isdigit()}


def _tensors(uri: str) -> dict[str, Tensor]:
    try:
        if storage.read_bytes(uri, 0, 2) == b"PK":
            return dict(tensors_in(uri))
        return load_file(storage.local_copy(uri))
    except (Unreadable, SafetensorError, ValueError, OSError) as error:
        raise Refused(f"{uri} cannot be read as weights: {error}. Give a file of torch.save or safetensors.") from None
