"""The token of an environment, and what travels sealed under it."""

import os

import pytest

from pipelines import tokens
from pipelines.errors import Failed, Refused
from pipelines.tokens import Token

VALUES = {"AWS_SECRET_ACCESS_KEY": "hush-hush", "PLAIN": "é=1\n2"}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An environment without any token, and a home without one."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", tokens.SEALED, *VALUES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_order_in_which_a_token_is_found_is_rays_own(bare, monkeypatch):
    assert tokens.find() is None
    (bare / ".ray").mkdir()
    (bare / ".ray/auth_token").write_text("from-home\n")
    assert tokens.find() == Token("from-home", "the file ~/.ray/auth_token")
    (bare / "t").write_text(" from-file \n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(bare / "t"))
    assert tokens.find() == Token("from-file", f"the file at RAY_AUTH_TOKEN_PATH={bare / 't'}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-variable")
    assert tokens.find() == Token("from-variable", "RAY_AUTH_TOKEN")
    assert "from-variable" not in repr(tokens.find())


def test_a_path_that_leads_nowhere_or_to_nothing_is_refused(bare, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(bare / "none"))
    with pytest.raises(Refused, match=r"RAY_AUTH_TOKEN_PATH=.*none cannot be read: No such file"):
        tokens.find()
    (bare / "none").write_text("\n")
    with pytest.raises(Refused, match="is an empty file"):
        tokens.find()
    (bare / "none").write_bytes(b"a page\r\nof text \xff")
    with pytest.raises(Refused, match=r"none does not hold a token: it has \d+ characters that are not one plain word"):
        tokens.find()


def test_variables_come_out_as_they_went_in_and_say_nothing_on_the_way(bare, monkeypatch):
    sealed = tokens.seal(VALUES, Token("the-token", "somewhere"))
    assert not any(word in sealed for word in ("hush", "AWS", "token"))
    assert sealed != tokens.seal(VALUES, Token("the-token", "somewhere"))
    monkeypatch.setenv(tokens.SEALED, sealed)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-token")
    for name in VALUES:
        monkeypatch.setenv(name, "overruled")
    tokens.open_environment()
    assert {name: os.environ[name] for name in VALUES} == VALUES


@pytest.mark.parametrize("token", [None, "another-token"])
def test_a_node_with_another_token_says_so(bare, monkeypatch, token):
    monkeypatch.setenv(tokens.SEALED, tokens.seal(VALUES, Token("the-token", "somewhere")))
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(Failed, match=r"this node's token .* is another\.") as error:
        tokens.open_environment()
    assert "another-token" not in str(error.value).replace("is another", "")
    assert "PLAIN" not in os.environ


def test_where_nothing_came_sealed_nothing_happens(bare):
    before = dict(os.environ)
    tokens.open_environment()
    assert dict(os.environ) == before
