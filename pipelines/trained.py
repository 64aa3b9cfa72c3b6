"""From a finished run to a bundle, and from a bundle back to a model that encodes and decodes."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines import recipe, storage
from pipelines.errors import Failed, Refused
from pipelines.options import differences
from pipelines.recipe import Recipe, Settings
from vqcore.bundle import read_bundle, read_card, write_bundle

PACKAGES = ("vqray", "torch", "numpy", "pyarrow", "ray", "mlflow", "safetensors")


@dataclass(frozen=True)
class Trained:
    """A bundle opened for use: the model is in evaluation mode."""

    recipe: Recipe
    settings: Settings
    model: nn.Module
    card: dict[str, Any]
    digest: str


def rebuild(found: Recipe, settings: Settings) -> nn.Module:
    """The last stage's model, untrained: every stage's build in turn, as training does it."""
    model: nn.Module | None = None
    for stage in found.stages(settings):
        model = stage.build(settings, model)
    if model is None:
        raise ValueError(f"recipe {found.name!r} has no stages")
    return model


def write_trained(out: str, model: nn.Module, about: Mapping[str, Any]) -> str:
    """Write `<out>/bundle` (weights first, card last) and return its digest.

    Args:
        about: what the card says beside the files' digests and the package versions. No times, hosts or paths.
    """
    found = recipe.load(about["recipe"])
    fitted = {} if found.fitted is None else {"fitted": found.fitted(model)}
    card = {**about, **fitted, "packages": {name: version(name) for name in PACKAGES}}
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    home = storage.join(out, "bundle")
    if storage.is_local(home):
        return write_bundle(Path(home), tensors, card)
    with tempfile.TemporaryDirectory() as scratch:
        digest = write_bundle(Path(scratch), tensors, card)
        for name in (*read_card(Path(scratch))["files"], "card.json"):
            storage.upload(str(Path(scratch) / name), storage.join(home, name))
    return digest


def open_trained(directory: Path, device: str | torch.device = "cpu") -> Trained:
    """Verify a local bundle directory and rebuild its model from (recipe name, settings, weights).

    Raises:
        BundleError: the directory is not a whole, unaltered bundle.
        Failed: the weights do not fit the network that the card's settings describe.
    """
    bundle = read_bundle(directory)
    found = recipe.load(bundle.card["recipe"])
    settings = found.Settings.model_validate(bundle.card["settings"])
    model = rebuild(found, settings)
    try:
        model.load_state_dict(bundle.tensors, strict=True)
    except RuntimeError as mismatch:
        raise Failed(f"the weights in {directory} do not fit the network its card describes: {mismatch}") from None
    return Trained(found, settings, model.to(device).eval(), bundle.card, bundle.digest)


def check_fits(card: Mapping[str, Any], kind: str, corpus_settings: Mapping[str, Any], shards: str) -> None:
    """Shards must hold what the bundle was trained on: the same kind of rows, prepared the same way.

    Raises:
        Refused: naming every setting that differs and the ingest that would make them agree.
    """
    trained_on = card["corpus"]
    if trained_on["kind"] != kind:
        raise Refused(f"the bundle was trained on {trained_on['kind']}; {shards} holds {kind}.")
    if different := differences(trained_on["settings"], corpus_settings):
        raise Refused(
            f"{shards} was prepared otherwise than what the bundle was trained on ({'; '.join(different)})."
            " Ingest the source again with `vqray ingest --bundle REF`, which takes the preparation from the card."
        )
