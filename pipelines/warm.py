"""Warm starts: a run's model begins as that of a bundle with the same settings but fewer codes, its codebooks grown."""

from collections.abc import Mapping

import torch
from torch import nn

from pipelines import registry, trained
from pipelines.errors import Failed, Refused
from pipelines.recipe import Recipe, Settings
from vqcore.bundle import read_bundle, read_card
from vqcore.codebook import Codebook
from vqcore.growth import grow


@torch.no_grad()
def start(model: nn.Module, bundle: str) -> str:
    """Fill an untrained model from a bundle; its codebooks grow by splitting the codes that are used the most.

    Says in a sentence what was done. Optimisers and schedules begin anew.

    Raises:
        Failed: the bundle's network is another one.
    """
    tensors = read_bundle(registry.local_bundle(bundle)).tensors
    books = {name: module for name, module in model.named_modules() if isinstance(module, Codebook)}
    if odd := unlike({name: tensor.shape for name, tensor in tensors.items()}, model):
        raise Failed(f"cannot grow from {bundle}: its {odd} has another shape, and only codebooks grow.")
    own = model.state_dict()
    held = {name for book in books for name in own if name.startswith(f"{book}.")}
    model.load_state_dict({name: own[name] if name in held else tensors[name] for name in own}, strict=True)
    for name, book in books.items():
        vectors, counts = tensors[f"{name}.vectors"], tensors[f"{name}.counts"]
        book.set_vectors(grow(vectors.to(book.vectors.device), counts.to(book.vectors.device), book.num_codes))
    sizes = ", ".join(f"{len(tensors[f'{name}.vectors'])} to {book.num_codes}" for name, book in books.items())
    return f"codebook grown from {sizes} codes, the network taken over"


def check(found: Recipe, small: Settings, large: Settings) -> None:
    """Whether runs of the larger settings can start from bundles of the smaller.

    Raises:
        Refused: the recipe trains in several stages, or more than plain codebooks depends on the number of codes.
    """
    if len(found.stages(large)) > 1:
        raise Refused(f"recipe {found.name!r} trains in several stages, of which no one is grown; leave --grow out.")
    model = trained.rebuild(found, large)
    books = [module for module in model.modules() if isinstance(module, Codebook)]
    shapes = {name: tensor.shape for name, tensor in trained.rebuild(found, small).state_dict().items()}
    if not books or (odd := unlike(shapes, model)):
        why = f"{odd} changes with the number of codes" if books else "it has no plain codebook"
        raise Refused(f"the codebook of recipe {found.name!r} cannot be grown: {why}; leave --grow out.")


def unlike(shapes: Mapping[str, torch.Size], model: nn.Module) -> str | None:
    """A tensor of the model that these have not, or have in another shape; codebooks may have fewer codes."""
    books = {name: module for name, module in model.named_modules() if isinstance(module, Codebook)}
    for name, tensor in model.state_dict().items():
        if name not in shapes:
            return name
        book, _, field = name.rpartition(".")
        grows = book in books and field in ("vectors", "counts", "sums") and len(shapes[name]) == tensor.ndim
        if grows and shapes[name][0] <= len(tensor) and shapes[name][1:] == tensor.shape[1:]:
            continue
        if shapes[name] != tensor.shape:
            return name
    return None


def digest_of(bundle: str) -> str:
    """The digest of the bundle that a run starts from."""
    return str(read_card(registry.local_bundle(bundle))["digest"])
