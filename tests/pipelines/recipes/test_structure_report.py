"""The whole report on tiny shards: its files, its numbers, what a kill leaves, and what is refused."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.errors import Refused
from pipelines.recipe import ReportJob
from pipelines.recipes import _structure_report as reports
from pipelines.recipes import _structure_sections as sections
from pipelines.recipes._protein_tokens import ProteinTokens
from pipelines.shards import ShardReader
from tests.pipelines.protein_shards import CODES, SUFFIXES, complexes, make_protein_shards, protein

FAST = {"steps": 20, "rates": (1e-2,), "pair_suffixes": SUFFIXES}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_protein_shards(tmp_path_factory.mktemp("shards"), complexes(16))


def job_of(shards: str, out: Path, split: str = "test", **settings) -> ReportJob:
    opened = SimpleNamespace(digest="d" * 64, recipe=SimpleNamespace(name="x"), settings=None)
    given = reports.StructureReportSettings(**{**FAST, **settings})
    return ReportJob(opened, out, ShardReader(shards), split, given, str(out))


def tokens(what: str = "residues & <codes>") -> ProteinTokens:
    """Codes are residues; latents hold the backbone, and the decoder hands it back."""
    book = torch.eye(CODES, 9)
    return ProteinTokens(
        book, lambda batch: batch.columns["residues"].masked_fill(~batch.columns["residue_mask"], -1), what,
        lambda batch: batch.columns["backbone"][:, :, :3].flatten(2),
        lambda vectors, mask: vectors.view(*mask.shape, 3, 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(shards, tmp_path_factory) -> tuple[ReportJob, dict[str, float]]:
    job = job_of(shards, tmp_path_factory.mktemp("report"))
    reports.refuse(job)
    return job, reports.write(job, tokens())


def told(job: ReportJob) -> dict:
    return json.loads((Path(job.out) / "structure.json").read_text())


def test_every_question_is_answered_on_the_split_asked_for(made):
    job, numbers = made
    rows = [row for split, row in complexes(16) if split == "test"]
    assert numbers["residues"] == sum(row["length"] for row in rows)
    assert numbers["usage"] == len({code for row in rows for code in row["residues"]}) / CODES
    assert numbers["cosine_all"] == 0
    assert numbers["sensitivity_codes_spearman_normalised"] > 0.5
    assert numbers["rmsd_unquantized"] < 1e-3 < numbers["rmsd_codes"]
    assert numbers["contact_test_auroc_codes"] > 0.9
    assert numbers["contact_test_auroc_control"] == 0.5
    found = told(job)
    assert found["metrics"] == numbers
    assert found["sensitivity"]["pairs"] == len(rows) // 2
    assert [task["name"] for task in found["effectiveness"]["tasks"]] == ["contact", "secondary", "b_factors"]


def pairs_of_chains() -> list[tuple[str, dict]]:
    """As many conformations in train, valid and test as 1, 2 and 3 proteins have."""
    drawn = np.random.default_rng(0)
    splits = ("train", "valid", "valid", "test", "test", "test")
    return [
        (split, protein(f"c{number}{suffix}.pdb", drawn, 12 + number))
        for number, split in enumerate(splits)
        for suffix in SUFFIXES
    ]


def test_what_is_rebuilt_is_the_split_asked_for(tmp_path):
    home = make_protein_shards(tmp_path / "shards", pairs_of_chains())
    for split, chains in (("valid", 4), ("test", 6)):
        found = sections.Sections(job_of(home, tmp_path, split), tokens()).reconstruction()["scores"]
        assert {name: one["chains"] for name, one in found.items()} == dict.fromkeys(found, chains)


def test_chains_are_aligned_by_their_own_vectors_where_they_have_a_place(tmp_path, monkeypatch):
    rows = pairs_of_chains()
    rows[7][1]["atoms"][3, 1] = 0
    home = make_protein_shards(tmp_path / "shards", rows)
    given: dict = {}
    monkeypatch.setattr(
        sections.sensitivity,
        "similarities",
        lambda pairs, vectors, alphas, _: given.update(vectors, alphas=alphas) or {},
    )
    judged = replace(tokens(), latents=lambda batch: 1.0 * batch.columns["numbers"].unsqueeze(-1))
    assert sections.Sections(job_of(home, tmp_path), judged).sensitivity()["found"] == 3
    for chain, row in enumerate(row for split, row in rows if split == "test"):
        kept = row["atoms"][:, 1] == 1
        assert kept.all() == (chain != 1)
        np.testing.assert_array_equal(given["codes"][chain], np.eye(CODES, 9)[row["residues"][kept]])
        np.testing.assert_array_equal(given["latents"][chain][:, 0], row["numbers"][kept])
        np.testing.assert_array_equal(given["alphas"][chain], row["backbone"][kept, 1])


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.seen.add(tag)
        assert not {"src", "href"} & {name for name, _ in attributes}
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.seen.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_escaped_and_loads_nothing(made):
    page = (Path(made[0].out) / "structure.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "residues & <codes>" in tags.text
    assert {"svg", "polyline", "circle", "rect", "table"} <= tags.seen
    assert not {"script", "link", "img", "codes"} & tags.seen
    assert not re.search(r"https?://|nan|None", page)
    for title in ("Efficiency", "Distinctiveness", "Sensitivity", "Effectiveness", "Reconstruction"):
        assert title in tags.text


def test_what_a_kill_left_is_not_made_again(shards, tmp_path, monkeypatch):
    job = job_of(shards, tmp_path / "out", kmeans=False)
    made: list[str] = []
    once = sections.effects.effectiveness

    def killed(task, *args, **more):
        made.append(task.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return once(task, *args, **more)

    monkeypatch.setattr(sections.effects, "effectiveness", killed)
    with pytest.raises(KeyboardInterrupt):
        reports.write(job, tokens())
    for name in ("similarities",):
        monkeypatch.setattr(sections.sensitivity, name, lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(sections, "reconstruction", lambda *_: pytest.fail("made again"))
    numbers = reports.write(job, tokens())
    assert made == ["contact", "secondary", "secondary", "b_factors"]
    whole = job_of(shards, tmp_path / "whole", kmeans=False)
    monkeypatch.undo()
    assert reports.write(whole, tokens()) == numbers


def test_tokens_made_elsewhere_are_judged_alike(shards, made, tmp_path):
    lines = [{"name": row["name"], "chain": "A", "codes": row["residues"].tolist()} for _, row in complexes(16)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    np.save(tmp_path / "v.npy", np.eye(CODES, 9))
    given = {"tokens": str(tmp_path / "t.jsonl"), "vectors": str(tmp_path / "v.npy")}
    job = job_of(shards, tmp_path / "out", beside=(made[0].out,), **given)
    reports.refuse(job)
    numbers = reports.write(job, tokens())
    same = {name: value for name, value in made[1].items() if not re.search("latents|rmsd|lddt", name)}
    assert numbers == same
    page = (tmp_path / "out" / "structure.html").read_text()
    assert "residues &amp; &lt;codes&gt;" in page
    assert "tokens of t.jsonl" in page


def test_tasks_of_other_shards_and_pairs_of_a_table(shards, tmp_path):
    other = make_protein_shards(tmp_path / "other", complexes(8, seed=1))
    (tmp_path / "tasks.toml").write_text(
        f'[[task]]\nname = "far <b>"\nlabel = "contact"\nkind = "binary"\nshards = "{other}"\n'
        f'[[task]]\nname = "<i>none"\nlabel = "secondary"\nkind = "binary"\nshards = "{other}"\n'
    )
    (tmp_path / "pairs.csv").write_text(
        "a,chain_a,b,chain_b\n" + "".join(f"c0{n}_u,A,c0{n}_b-matched,A\n" for n in range(8)) + "gone,A,c00_u,A\n"
    )
    job = job_of(
        shards, tmp_path / "out", tasks=str(tmp_path / "tasks.toml"), pairs=str(tmp_path / "pairs.csv"),
        pairs_shards=other, pair_suffixes=(), latents=False, kmeans=False,
    )  # fmt: skip
    reports.refuse(job)
    numbers = reports.write(job, tokens())
    assert numbers["far__b__test_auroc_codes"] > 0.8
    found = told(job)
    assert (found["sensitivity"]["pairs"], found["sensitivity"]["not_there"]) == (8, 1)
    assert found["effectiveness"]["tasks"][0]["tests"]["test"]["test"] == sum(
        row["length"] for split, row in complexes(8, seed=1) if split == "test"
    )
    assert "holds 2" in found["effectiveness"]["tasks"][1]["skipped"]
    page = (tmp_path / "out" / "structure.html").read_text()
    assert "&lt;i&gt;none was skipped" in page
    assert not re.search("<b>|<i>", page)


def test_sections_that_cannot_be_measured_say_why(shards, tmp_path):
    job = job_of(shards, tmp_path, split="valid", pair_suffixes=())
    bare = ProteinTokens(torch.eye(CODES), tokens().codes, "bare")
    numbers = reports.write(job, bare)
    assert set(numbers) == {
        "codes", "residues", "usage", "perplexity", "perplexity_share", "entropy_per_code", "cosine_all", "cosine_used",
    }  # fmt: skip
    page = (tmp_path / "structure.html").read_text()
    for reason in ("report --split test", "pair_suffixes=", "without a decoder"):
        assert reason in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": "gone.toml"}, "does not exist"),
        ({"pairs": "gone.csv"}, "does not exist"),
        ({"tokens": "gone.jsonl", "vectors": "gone.npy"}, "does not exist"),
        ({"beside": ("gone",)}, "holds no structure.json"),
    ],
)
def test_what_cannot_end_well_is_refused_before_work(shards, tmp_path, monkeypatch, settings, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=said):
        reports.refuse(job_of(shards, tmp_path, **settings))


def test_shards_with_other_residues_are_refused(shards, tmp_path):
    other = make_protein_shards(tmp_path / "other", complexes(4), missing="keep")
    (tmp_path / "tasks.toml").write_text(
        f'[[task]]\nname = "a"\nlabel = "contact"\nkind = "binary"\nshards = "{other}"\n'
    )
    with pytest.raises(Refused, match="was ingested with missing=keep"):
        reports.refuse(job_of(shards, tmp_path, tasks=str(tmp_path / "tasks.toml")))


def test_reports_of_other_rows_do_not_stand_in_one_table(shards, made, tmp_path):
    with pytest.raises(Refused, match="do not belong in one table"):
        reports.refuse(job_of(shards, tmp_path, split="valid", beside=(made[0].out,)))


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": "x.jsonl"},
        {"pair_suffixes": ("_u",)},
        {"pair_suffixes": ("_u", "_u")},
        {"rates": ()},
        {"rates": (0.0,)},
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(ValueError, match=r"go together|two different|positive"):
        reports.StructureReportSettings(**settings)


def test_conformations_may_be_those_of_other_shards_without_a_table(shards, tmp_path):
    """Of a chain's models, or told by suffixes."""
    other = make_protein_shards(tmp_path / "other", complexes(12, seed=1))
    job = job_of(shards, tmp_path / "out", pairs_shards=other, latents=False)
    reports.refuse(job)
    found = sections.Sections(job, tokens()).sensitivity()
    assert found["pairs"] == 12
    own = sections.Sections(job_of(shards, tmp_path / "own", latents=False), tokens()).sensitivity()
    assert own["each"] != found["each"]


def test_what_files_hold_is_part_of_what_a_report_is_of(shards, tmp_path):
    """Under the same path: tokens exported again, a task defined otherwise."""
    files = {name: tmp_path / file for name, file in (("tasks", "t.toml"), ("pairs", "p.csv"), ("tokens", "c.jsonl"))}
    for file in files.values():
        file.write_text("")
    files["tasks"].write_text('[[task]]\nname = "a"\nlabel = "contact"\nkind = "binary"\n')
    np.save(tmp_path / "v.npy", np.eye(3))
    job = job_of(
        shards, tmp_path / "out", **{name: str(file) for name, file in files.items()}, vectors=str(tmp_path / "v.npy")
    )
    before = reports.given(job)
    assert before.keys() == {*files, "vectors"}
    assert reports.given(job) == before
    for name, file in files.items():
        file.write_text(file.read_text() + "\n")
        after = reports.given(job)
        assert {key for key in before if after[key] != before[key]} == {name}
        before = after


def test_a_division_by_cath_is_refused_on_shards_whose_test_rows_it_would_train_on(shards, tmp_path):
    (tmp_path / "cath.csv").write_text("file,chain,code\nc00_u.pdb,A,1.10.10.10\n")
    task = '[[task]]\nname = "fold"\nlabel = "contact"\nkind = "binary"\nsplit = "cath"\n'
    task += f'cath = "{tmp_path / "cath.csv"}"\n'
    (tmp_path / "tasks.toml").write_text(task)
    with pytest.raises(
        Refused, match=r"'fold': split = \"cath\" divides all rows of .* train rows of .* give them as shards"
    ):
        reports.refuse(job_of(shards, tmp_path, tasks=str(tmp_path / "tasks.toml")))
    other = make_protein_shards(tmp_path / "other", complexes(8, seed=1))
    (tmp_path / "tasks.toml").write_text(task + f'shards = "{other}"\n')
    with pytest.raises(Refused, match=r"\d+ of them are train rows"):
        reports.refuse(job_of(shards, tmp_path, tasks=str(tmp_path / "tasks.toml")))
    unseen = [(split, {**row, "name": f"new/{row['name']}"}) for split, row in complexes(8, seed=1)]
    other = make_protein_shards(tmp_path / "unseen", unseen)
    (tmp_path / "tasks.toml").write_text(task + f'shards = "{other}"\n')
    reports.refuse(job_of(shards, tmp_path, tasks=str(tmp_path / "tasks.toml")))
