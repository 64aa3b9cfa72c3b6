"""Submitting, up to the cluster's door: what is refused there and before, and what is said of it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import ray

from jobs import cli
from pipelines import jobs_api, submission
from pipelines.errors import Refused

TOKEN = "the-token-itself"
VERB = ["--", "train", "--recipe", "r", "--shards", "s3://b/s", "--out", "s3://b/o"]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Set, so that it is put back: connecting changes it.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("VQRAY_RUNS", "runs-here")


class Door(BaseHTTPRequestHandler):
    """What a dashboard answers to a request for its version."""

    guarded = True
    version = ray.__version__

    def do_GET(self):
        asked = self.headers.get("Authorization")
        status = 200 if not self.guarded or asked == f"Bearer {TOKEN}" else 403 if asked else 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": self.version, "version": "5"}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def door():
    """(address, the class whose attributes say how it answers) of a server on loopback."""
    handler = type("Door", (Door,), {})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


def refused(capsys, *words: str) -> str:
    assert cli.main(["submit", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert TOKEN not in said.err
    return said.err


@pytest.mark.parametrize("address", ["http://10.1.2.3:8265", "https://ray.example.org", "http://0.0.0.0:8265"])
def test_without_a_token_nothing_goes_to_a_public_address(address, capsys):
    said = refused(capsys, "--address", address, *VERB)
    assert f"there is no token for {address}" in said
    assert "may run any program on it" in said
    assert "is no address of this machine alone" in said
    assert "RAY_AUTH_TOKEN_PATH" in said


def test_without_a_token_nothing_goes_to_this_machine_either(door, capsys):
    said = refused(capsys, "--address", door[0], *VERB)
    assert "there is no token" in said
    assert "no address of this machine alone" not in said


def test_a_wrong_token_is_named_by_where_it_came_from(door, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-one")
    said = refused(capsys, "--address", door[0], *VERB)
    assert "does not take the token from RAY_AUTH_TOKEN" in said
    assert "wrong-one" not in said


def test_a_cluster_that_asks_for_no_token_gets_no_job(door, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    door[1].guarded = False
    said = refused(capsys, "--address", door[0], *VERB)
    assert "takes jobs from anybody" in said
    assert "RAY_AUTH_MODE=token" in said


def test_another_version_of_ray_is_refused_with_both(door, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    door[1].version = "2.9.3"
    said = refused(capsys, "--address", door[0], *VERB)
    assert "runs Ray 2.9.3" in said
    assert ray.__version__ in said


def test_where_nobody_answers_the_address_is_named(capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    said = refused(capsys, "--address", "http://127.0.0.1:9", *VERB)
    assert "nothing answers at http://127.0.0.1:9" in said


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        (None, {}, jobs_api.HERE),
        ("h:8265/", {}, "http://h:8265"),
        ("https://h/ray", {}, "https://h/ray"),
        (None, {"RAY_ADDRESS": "http://h:1"}, "http://h:1"),
        (None, {"RAY_ADDRESS": "http://h:1", "RAY_API_SERVER_ADDRESS": "h:2"}, "http://h:2"),
        ("http://h:3", {"RAY_ADDRESS": "http://h:1", "RAY_API_SERVER_ADDRESS": "http://h:2"}, "http://h:3"),
    ],
)
def test_the_address_that_is_nearest_to_the_user_wins(given, environment, address, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert jobs_api.address_of(given) == address


@pytest.mark.parametrize(
    ("given", "variable", "said"),
    [
        ("ray://h:10001", None, "--address ray://h:10001 is not a dashboard's address"),
        (None, "h:6379", "RAY_ADDRESS h:6379 is not a dashboard's address"),
        ("http://me:secret@h", None, "--address holds a name or password"),
    ],
)
def test_an_address_that_is_none_is_refused(given, variable, said, monkeypatch):
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    with pytest.raises(Refused, match=said) as error:
        jobs_api.address_of(given)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://127.3.2.1", True),
        ("http://localhost:1", True),
        ("http://[::1]:8265", True),
        ("http://0.0.0.0:8265", False),
        ("http://10.0.0.1", False),
        ("https://localhost.example.org", False),
    ],
)
def test_what_loopback_is(address, here):
    assert jobs_api.is_loopback(address) is here


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "trian"], "'trian' is none; did you mean 'train'"),
        (["--", "submit", "--", "recipes"], "'submit' is none"),
        (["--env", "AWS_KEY=abc123", *VERB], "AWS_KEY was given with a value"),
        (["--env", "RAY_AUTH_TOKEN", *VERB], "what begins with RAY_ is the cluster's own"),
        (["--env", "MLFLOW_TRACKING_URL", *VERB], "no such variable here; did you mean 'MLFLOW_TRACKING_URI'"),
        (["--", "train", "--recipe", "r", "--shards", "shards", "--out", "s3://b/o"], "--shards shards is relative"),
        (["--", "train", "--recipe", "r", "--shards", "/s", "--out", "o"], "--out o is relative"),
        (["--", "encode", "--bundle", "runs/a", "--shards", "/s", "--out", "/o"], "--bundle runs/a is relative"),
        (["--", "ingest", "--corpus", "images", "--source", "/a", "b", "--out", "/o"], "--source b is relative"),
        (["--", "demo"], "--out was not given, and what a job writes into its working directory is thrown away"),
        (["--", *VERB[1:-2]], "for `train` set VQRAY_RUNS to where runs go and name it with --env"),
        (["--env", "VQRAY_RUNS", *VERB[:-2]], "VQRAY_RUNS runs-here is relative"),
    ],
)
def test_mistakes_are_refused_before_the_cluster_is_asked(words, said, capsys, monkeypatch):
    monkeypatch.setattr(jobs_api, "connect", lambda _: pytest.fail("the cluster was asked"))
    told = refused(capsys, *words)
    assert said in told
    assert "abc123" not in told


def test_the_verbs_own_arguments_are_checked_here_too(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["submit", "--", "train", "--recipe", "r"])
    assert "vqray train: error: the following arguments are required: --shards" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["logs"], ["stop"], ["list", "train-1"]])
def test_jobs_wants_an_id_where_there_is_one_to_name(words, capsys):
    assert cli.main(["jobs", *words]) == 2
    assert "take a job's id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "expected"),
    [(0, 0), (1, 1), (2, 2), (127, 127), (-9, 1), (None, 1)],
)
def test_the_exit_code_is_the_jobs_own_where_it_has_one(code, expected):
    job = jobs_api.Job("j", "FAILED", code, "", {}, 0.0, 1.0, "n")
    api = jobs_api.JobsApi("http://h", jobs_api.Token(TOKEN, "x"), None)
    assert submission.outcome(api, job)["exit_code"] == expected


def chunks_of(log: bytes, size: int) -> str:
    said: list[str] = []
    text = jobs_api._Text(said.append)
    for low in range(0, len(log), size):
        text.write(log[low : low + size])
    text.catch_up(log)
    return "".join(said)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_log_comes_whole_and_without_rays_own_first_lines_however_it_is_cut(size):
    log = "Runtime env is setting up.\nRunning entrypoint for job j: x\nstep é\r 50%|█\r100%|██\n{}\n".encode()
    assert chunks_of(log, size) == "step é\r 50%|█\r100%|██\n{}\n"
    assert chunks_of(log[:30], size) == log[:30].decode()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("bar\r 9%\nworked\n" + '{"out": "x"}\n', {"out": "x"}),
        ("no json\n", {}),
        ("[1]\n", {}),
        ("", {}),
    ],
)
def test_the_result_is_the_last_line_where_it_is_one(text, found):
    assert submission._last_line(text) == found
