"""The server over HTTP: who may ask, what is refused with which status, and who leaves."""

import copy
import json
import threading
import time

import httpx2
import pytest
import uvicorn
from starlette.testclient import TestClient

from xlvlm_jax import steering
from xlvlm_jax.playground import server
from xlvlm_jax.playground.answers import Answers

from .conftest import TOKEN

PATHS = ("vector", "answers", "python", "maps")  # that settings are sent to


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, base_url=f"http://127.0.0.1/{TOKEN}/") as opened:
        yield opened


@pytest.fixture(scope="module")
def uploaded(client, made):
    found = client.post(f"pictures?name={made.picture.name}", content=made.picture.read_bytes())
    assert found.status_code == 200
    return found.json()["id"]


@pytest.fixture
def asked(uploaded, made):
    sliders = [{"item": "vectors/yes-no", "strength": 1}]
    return {"picture": uploaded, "question": made.question, "sliders": sliders}


def lines(response):
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.parametrize("path", ["/", "/state", "/other-token/state", f"/{TOKEN}x/", "/play.js"])
def test_without_the_token_nothing_is_told(app, path):
    with TestClient(app, base_url="http://127.0.0.1") as stranger:
        found = stranger.get(path)
    assert found.status_code == 403
    assert found.json() == {
        "error": "this address lacks the token; open the one that `xlvlm play` printed"
    }


def test_other_host_names_are_refused(app):
    with TestClient(app, base_url="http://elsewhere.example") as stranger:
        assert stranger.get(f"/{TOKEN}/state").status_code == 400


def test_tokens_are_long_and_new():
    assert len(server.new_token()) > 20 and server.new_token() != server.new_token()


@pytest.mark.parametrize("name", ["", "play.js", "play.css", "report.css"])
def test_the_page_asks_nobody_else(client, name):
    found = client.get(name)
    assert found.status_code == 200 and "https:" not in found.text
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert found.headers["referrer-policy"] == "no-referrer"


def test_the_state_lists_what_steers(client, made, vlm):
    state = client.get("state").json()
    first = state["items"][0]
    assert (first["id"], first["words"], first["pictures"]) == ("concepts/0", ["yes", "right"], 1)
    assert state["sites"][: len(vlm.layers)] == list(vlm.layers)
    shown = client.get("concepts/concepts/0/pictures/0")
    assert shown.headers["content-type"] == "image/jpeg" and shown.content[:2] == b"\xff\xd8"
    assert client.get("concepts/concepts/0/pictures/1").status_code == 404
    assert client.get("concepts/none/0/pictures/0").status_code == 404


def test_who_waits_is_told_when_the_programs_are_compiled(answers, pictures, monkeypatch):
    go_on = threading.Event()

    def prepare(picture):
        go_on.wait(10)
        yield {}

    monkeypatch.setattr(answers, "prepare", prepare)
    model = server.Model("embedded", None)
    preparing = server.create_app(answers, model, pictures, TOKEN, prepares=True)
    with TestClient(preparing, base_url=f"http://127.0.0.1/{TOKEN}/") as opened:
        assert opened.get("state").json()["prepared"] is False
        assert opened.get("prepared").json() == {"prepared": False}
        threading.Timer(0.1, go_on.set).start()
        assert opened.get("prepared").json() == {"prepared": True}
        assert opened.get("state").json()["prepared"] is True


def test_a_picture_of_a_concept_can_be_asked_about(client, made, uploaded):
    found = client.post("concepts/concepts/0/pictures/0").json()
    assert found == {"id": uploaded, "name": made.picture.name}
    assert client.post("concepts/concepts/0/pictures/1").status_code == 404


def test_answers_are_streamed_word_by_word(client, asked):
    events = lines(client.post("answers", json=asked))
    assert events[0] == {"ahead": 0}
    texts = [e["text"] for e in events if e.get("run") == "steered"]
    assert texts[-1] == "no" and "seconds" in events[-1]


def test_a_picture_comes_back(client, uploaded):
    found = client.get(f"pictures/{uploaded}")
    assert found.headers["content-type"] == "image/png" and found.content[1:4] == b"PNG"


def test_what_is_no_picture_is_refused(client):
    found = client.post("pictures?name=../../evil.png", content=b"not a picture")
    assert found.status_code == 415
    assert found.json()["error"].startswith("evil.png: not an image in a known format")


def test_what_is_too_large_is_refused_before_it_is_read(client, monkeypatch):
    monkeypatch.setattr(server, "LARGEST", 2**20)
    found = client.post("pictures", content=b"x" * (2**20 + 1))
    assert found.status_code == 413 and "larger than 1 MB" in found.json()["error"]


def test_a_vector_can_be_added_and_steers(client, made, asked):
    content = (made.run / "steering" / "yes-no.safetensors").read_bytes()
    added = client.post("vectors?name=mine.safetensors", content=content).json()
    assert (added["id"], added["name"]) == ("vectors/mine", "mine")
    asked["sliders"] = [{"item": "vectors/mine", "strength": 1}]
    assert lines(client.post("answers", json=asked))[-2]["words"]
    code = client.post("python", json=asked).json()["code"]
    assert "mine.safetensors" in code


def test_a_vector_of_another_model_is_refused(client, foreign):
    found = client.post("vectors?name=other.safetensors", content=foreign)
    assert found.status_code == 422
    assert found.json()["error"].startswith("the steering vector was fitted on 'another'")
    broken = client.post("vectors?name=broken.safetensors", content=foreign[:50])
    assert broken.status_code == 422 and "broken.safetensors" in broken.json()["error"]
    assert "/tmp" not in broken.json()["error"]


@pytest.mark.parametrize(
    ("path", "change", "status", "said"),
    [
        *((path, {"question": ""}, 422, "the question is empty") for path in PATHS),
        *(
            (path, {"sliders": [{"item": "a", "strength": "b"}]}, 422, "expected a number")
            for path in PATHS
        ),
        # A vector needs no picture.
        *(
            (path, {"picture": "gone"}, 404, "no longer here; choose it again")
            for path in PATHS[1:]
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(client, asked, path, change, status, said):
    found = client.post(path, json={**asked, "item": "vectors/yes-no", **change})
    assert found.status_code == status and said in found.json()["error"]
    assert "\n" not in found.json()["error"]


def test_what_is_not_json_is_refused(client):
    found = client.post("answers", content=b"{")
    assert found.status_code == 422 and found.json()["error"].startswith("expected JSON")


def test_unknown_items_are_refused(client, asked):
    asked["sliders"] = [{"item": "vectors/none", "strength": 1}]
    said = "there is no concept or vector 'vectors/none' here; reload the page"
    assert lines(client.post("answers", json=asked))[-1] == {"error": said}
    found = client.post("vector", json=asked)
    assert (found.status_code, found.json()["error"]) == (404, said)
    found = client.post("maps", json={**asked, "item": "vectors/none"})
    assert (found.status_code, found.json()["error"]) == (404, said)


def test_a_map_is_an_overlay(client, asked):
    found = client.post("maps", json={**asked, "item": "concepts/0"}).json()
    assert found["overlay"].startswith("data:image/png;base64,") and found["unit"] == "activation"


def test_the_saved_vector_is_one_of_the_project(client, asked, tmp_path, answers):
    (tmp_path / "v.safetensors").write_bytes(client.post("vector", json=asked).content)
    vector = steering.load(tmp_path / "v.safetensors")
    assert vector.vector.tolist() == answers.items["vectors/yes-no"].vector.tolist()
    found = client.post("vector", json={**asked, "sliders": []})
    assert (found.status_code, found.json()["error"][:24]) == (422, "all sliders are at zero;")


def test_who_leaves_ends_the_work(answers, pictures, made, vlm, monkeypatch):
    """A real server and connection: it is closed while the answer is being written."""
    steps, most = [], 500

    def endless(inputs, **options):
        (first, *_) = vlm.stream(inputs, **options)
        for _ in range(most):
            steps.append(first)
            time.sleep(0.01)
            yield first

    talking = Answers(copy.copy(vlm), answers.items.values(), answers.max_new_tokens)
    monkeypatch.setattr(talking.vlm, "stream", endless, raising=False)
    app = server.create_app(talking, server.Model("embedded", None), pictures, TOKEN)
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        base = f"http://127.0.0.1:{port}/{TOKEN}/"
        with httpx2.Client(base_url=base, timeout=60) as client:
            key = client.post("pictures", content=made.picture.read_bytes()).json()["id"]
            asked = {"picture": key, "question": made.question}
            with client.stream("POST", "answers", json=asked) as response:
                for number, _ in enumerate(response.iter_lines()):
                    if number == 3:
                        break
            # The worker is free again at once: the next job is answered.
            saved = client.post("python", json=asked)
            assert saved.status_code == 200
        assert 3 <= len(steps) < most
    finally:
        running.should_exit = True
        thread.join()


def test_a_picture_is_shared_as_it_was_uploaded(client, made, uploaded):
    assert client.get(f"pictures/{uploaded}/upload").content == made.picture.read_bytes()
    assert client.get("pictures/none/upload").status_code == 404


@pytest.mark.parametrize("name", ["..", ".", "a/..", "", "..\\.."])
def test_a_name_that_is_no_file_is_replaced(client, foreign, name):
    found = client.post("vectors", params={"name": name}, content=foreign)
    assert found.status_code == 422
    assert "the steering vector was fitted on" in found.json()["error"]
