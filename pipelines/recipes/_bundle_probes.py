"""What codes of a bundle say: which bundle it is, and whether new codes make streamlines like the real ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipelines.recipes._bundle_model import BundleModel, Chunk
from pipelines.recipes._bundle_scores import THRESHOLD
from vqcore import metrics, noise, polylines

POINTS = 32
"""To which streamlines are resampled before the nearest one is looked for."""
TRAIN_LINES = 200
"""Streamlines of a bundle's train chunks that the nearest one is looked for in, at most."""


def recognition(train: Sequence[Chunk], test: Sequence[Chunk], num_codes: int) -> dict[str, Any]:
    """Share of test chunks whose bundle is told: by the counts of their codes (1-NN by cosine, logistic regression), by
    the mean of their latents (1-NN), and by raw streamlines, each voting for the bundle of the nearest train one."""
    here, there = (np.array([one.label for one in side]) for side in (train, test))
    seen = sorted(set(here.tolist()))
    asked = np.isin(there, seen)
    found: dict[str, float] = {"chance": float(np.mean(there[asked] == np.bincount(here).argmax()))}
    features = {
        "latents": [np.stack([one.latents[one.places].mean(0).numpy() for one in side]) for side in (train, test)]
    }
    if train[0].codes is not None:
        features["codes"] = [np.stack([_histogram(one, num_codes) for one in side]) for side in (train, test)]
    for name, (known, new) in features.items():
        found[f"{name}_1nn"] = float(np.mean(here[_nearest(new, known)][asked] == there[asked]))
        if len(seen) > 1:
            found[f"{name}_linear"] = float(np.mean(_linear(known, here, new)[asked] == there[asked]))
    found["points_1nn"] = float(np.mean(_votes(train, test)[asked] == there[asked]))
    return {"accuracy": found, "chunks": int(asked.sum()), "of_bundles_without_train_chunks": int((~asked).sum())}


def _histogram(chunk: Chunk, num_codes: int) -> npt.NDArray[np.float64]:
    assert chunk.codes is not None
    counts: npt.NDArray[np.float64] = metrics.counts_of(chunk.codes[chunk.places], num_codes).double().sqrt().numpy()
    return counts


def _nearest(new: npt.NDArray[Any], known: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    one, other = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (new, known))
    found: npt.NDArray[np.intp] = (one @ other.T).argmax(1)
    return found


def _linear(known: npt.NDArray[Any], labels: npt.NDArray[Any], new: npt.NDArray[Any]) -> npt.NDArray[Any]:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(known, labels)
    predicted: npt.NDArray[Any] = fitted.predict(new)
    return predicted


def _votes(train: Sequence[Chunk], test: Sequence[Chunk]) -> npt.NDArray[np.int64]:
    taken: dict[int, list[Tensor]] = {}
    for one in train:
        taken.setdefault(one.label, []).append(one.lines)
    parts = {label: torch.cat(lines)[:TRAIN_LINES] for label, lines in taken.items()}
    known = polylines.resampled(torch.cat(list(parts.values())), POINTS)
    labels = torch.cat([torch.full((len(lines),), label) for label, lines in parts.items()])
    found = []
    for one in test:
        nearest = polylines.mdf_matrix(polylines.resampled(one.lines, POINTS), known).argmin(1)
        found.append(int(labels[nearest].bincount().argmax()))
    return np.array(found, np.int64)


def synthesis(
    train: Sequence[Chunk], test: Sequence[Chunk], model: BundleModel, count: int, seed: int
) -> dict[str, dict[str, Any]]:
    """New chunks of each bundle: halfway between the latents of a test and of a train chunk, and codes drawn from those
    of the bundle's train chunks at each position (or, where each streamline has codes of its own, for each streamline).
    Judged by BUAN to the nearest train chunk of the bundle, and by how far mean length and bending are from the
    bundle's (as a share of them). `real` is the same of test chunks themselves."""
    known = _by_bundle(train)
    made: dict[str, list[tuple[int, Tensor]]] = {"real": [], "interpolated": [], "drawn": []}
    for label, own in _by_bundle(test).items():
        if label not in known:
            continue
        made["real"] += [(label, one.lines) for one in own[:count]]
        for number, one in enumerate(own[:count]):
            latents, real = _halfway(one, known[label][number % len(known[label])], model.apart)
            made["interpolated"].append((label, _rendered(model, latents, real)))
        if model.look_up is not None and known[label][0].codes is not None:
            for number in range(count):
                codes = _drawn(known[label], seed + 1000 * label + number, model.apart)
                held = torch.stack([one.real for one in known[label]]).any(0)
                there = model.coded_lines(codes.unsqueeze(0))[0] & held
                made["drawn"].append((label, _rendered(model, model.look_up(codes), there)))
    return {name: _judged(chunks, known) for name, chunks in made.items() if chunks}


def _by_bundle(chunks: Sequence[Chunk]) -> dict[int, list[Chunk]]:
    found: dict[int, list[Chunk]] = {}
    for one in chunks:
        found.setdefault(one.label, []).append(one)
    return found


def _rendered(model: BundleModel, latents: Tensor, real: Bool[Tensor, " S"]) -> Float[Tensor, "R n 3"]:
    with torch.inference_mode():
        made: Tensor = model.render(latents.unsqueeze(0), real.unsqueeze(0))[0][real]
    return made


def _halfway(one: Chunk, other: Chunk, apart: bool) -> tuple[Float[Tensor, "h w D"], Bool[Tensor, " S"]]:
    """Latents between two chunks, and which streamlines there are. Where each has its own, those of the nearest."""
    if not apart:
        return (one.latents + other.latents) / 2, one.real & other.real
    nearest = torch.cdist(one.points.flatten(1), other.points.flatten(1))
    nearest = nearest.masked_fill(~other.real, torch.inf).argmin(1)
    return (one.latents + other.latents[nearest]) / 2, one.real


def _drawn(chunks: Sequence[Chunk], seed: int, apart: bool = False) -> Int64[Tensor, "h w"]:
    """At each position the code that one of the chunks has there, drawn alike; -1 where none has one. Where each
    streamline has its own, all of one streamline."""
    every = torch.stack([one.codes for one in chunks if one.codes is not None])
    draws = noise.shared_uniform(seed, 0, every[0].numel()).view(every.shape[1:])
    if apart:
        draws = draws[:, :1].expand_as(draws)
    held = every != -1
    first = (~held).byte().argsort(dim=0, stable=True)
    chosen = first.gather(0, (draws * held.sum(0)).long().unsqueeze(0))
    return every.gather(0, chosen)[0]


def _judged(chunks: Sequence[tuple[int, Tensor]], known: Mapping[int, Sequence[Chunk]]) -> dict[str, Any]:
    buan: list[float] = []
    length: list[float] = []
    bending: list[float] = []
    for label, lines in chunks:
        real = [one.lines for one in known[label]]
        buan.append(max(polylines.bundle_adjacency(lines, own, THRESHOLD) for own in real))
        whole = torch.cat(real)
        for kept, measure in ((length, polylines.lengths), (bending, polylines.bending)):
            own = float(measure(whole).mean())
            kept.append(abs(float(measure(lines).mean()) - own) / max(own, 1e-12))
    means = {"buan": buan, "length_off": length, "bending_off": bending}
    return {"chunks": len(chunks), **{name: float(np.mean(values)) for name, values in means.items()}}
