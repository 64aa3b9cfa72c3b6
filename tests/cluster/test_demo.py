"""The demo on a package of tiny pictures: every stage of the way, and a second run that finds all of it done."""

import hashlib
import json
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import recipe, registry
from pipelines.demo import demo
from pipelines.errors import Refused
from pipelines.recipe import Demo
from tests.pipelines.loops import TINY

NAME = "rotation_trick"


def make_wheel(home: Path) -> str:
    drawn = np.random.default_rng(0)
    home.mkdir(parents=True)
    path = home / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(60):
            pixels = BytesIO()
            flat = np.full((12, 12), drawn.integers(0, 255), np.uint8)
            flat[:, : number % 12] //= 2
            Image.fromarray(flat).save(pixels, format="PNG")
            archive.writestr(f"tiny/photos/{number}.png", pixels.getvalue())
        archive.writestr("tiny/photos/broken.png", b"not a picture")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("ray_instance")
def test_demo_makes_everything_it_says_and_again_finds_it_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'vqray.db'}")
    out = tmp_path / "demo"
    found = recipe.load(NAME)
    tiny = Demo(
        package="tiny",
        version="1.0",
        sha256=make_wheel(out / "package"),
        licence="CC0",
        about="60 squares",
        folder="tiny/photos",
        ingest={"size": 8, "colour": "grey"},
        train={**TINY[NAME], "steps": 12},
    )
    monkeypatch.setattr(recipe, "load", lambda name: replace(found, demo=tiny) if name == NAME else found)
    result = demo(NAME, out)
    assert result.rows == 60
    assert len(result.story) == 5
    assert "CC0" in capsys.readouterr().err
    assert len(list((out / "restored").glob("*.png"))) == result.metrics["rows"]
    assert all(Path(picture).stat().st_size > 1000 for picture in result.pictures)
    (entry,) = registry.list_entries(f"{NAME}-demo")
    assert entry.aliases == ["champion"]
    assert json.loads((out / "bundle" / "card.json").read_text())["digest"] == result.digest

    again = demo(NAME, out)
    assert (again.digest, result.skipped, again.skipped) == (result.digest, False, True)
    assert len(registry.list_entries(f"{NAME}-demo")) == 1


@pytest.mark.usefixtures("ray_instance")
def test_a_recipe_without_demo_data_names_those_that_have_some(tmp_path):
    with pytest.raises(Refused, match="these do: rotation_trick"):
        demo("plain_vq", tmp_path)
