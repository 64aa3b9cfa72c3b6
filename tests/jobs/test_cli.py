"""The command line without any work behind it: help, unknown verbs, exit codes, the one JSON line."""

import argparse
import json
import runpy
import sys

import pytest

from jobs import cli
from jobs.ingest import KINDS
from pipelines import corpora
from pipelines.errors import Failed, Refused


def test_overview_names_every_verb_with_its_first_line(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for verb, summary in cli.verbs().items():
        assert verb in out
        assert summary
        assert summary in out


def test_unknown_verb_names_the_nearest_and_exits_2(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(cli.verbs()))
def test_help_of_every_verb_shows_an_example_that_parses(verb, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([verb, "--help"])
    assert done.value.code == 0
    assert f"vqray {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(Refused("no"), 2), (Failed("half-way"), 1), (KeyboardInterrupt(), 1)])
def test_how_a_verb_ends_is_its_exit_code(error, code, capsys):
    def run(arguments):
        raise error

    assert cli._carry_out("train", run, argparse.Namespace()) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(error) in captured.err


def test_last_line_of_stdout_is_json(capsys):
    assert cli._carry_out("train", lambda _: {"out": "x", "digest": "y"}, argparse.Namespace()) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last.keys() >= {"out", "digest", "seconds", "skipped"}
    assert last["skipped"] is False


def test_a_verb_that_had_nothing_to_do_says_so(capsys):
    assert cli._carry_out("train", lambda _: {"out": "x", "digest": "y", "skipped": True}, argparse.Namespace()) == 0
    said = capsys.readouterr()
    assert "nothing to do" in said.err
    assert json.loads(said.out)["skipped"] is True


def test_help_of_ingest_names_every_kind():
    assert KINDS.removeprefix("what the files hold: ").replace(" or ", ", ").split(", ") == corpora.names()


@pytest.mark.parametrize("verb", cli.verbs())
def test_every_verb_is_a_module_that_runs(verb, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, f"jobs.{verb}", raising=False)  # runpy warns of what was imported before
    monkeypatch.setattr("sys.argv", [f"jobs/{verb}.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(f"jobs.{verb}", run_name="__main__", alter_sys=False)
    assert capsys.readouterr().out.startswith(f"usage: vqray {verb} ")
