"""`perpetune serve`: what it answers, what it refuses, and that a commit beside it drops no request."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from browser import browsing
from PIL import Image
from served import png, running
from tiny import dual_folder, picture, picture_folder, recipe, tiny_language_model, vit_folder
from warm import Warm

from perpetune.cli import call
from perpetune.errors import StateError, UsageError
from perpetune.learner import Learner
from perpetune.serve.models import Models, Watcher, mark_of
from perpetune.serve.server import bound
from perpetune.state import State
from perpetune.trained import Trained


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, `two` and `three`: a state after as many tasks, of two classes each; and their data."""
    root = tmp_path_factory.mktemp("serve")
    vit_folder(root / "model")
    for name, classes in {"a": ("cat", "dog"), "b": ("fox", "owl"), "c": ("hen", "cow")}.items():
        picture_folder(root / name, classes, 6)
    learner = Learner(recipe(root / "model", stream={}), root / "state")
    for name, kept in (("a", "one"), ("b", "two"), ("c", "three")):
        learner.learn(root / name)
        learner.save(root / kept)
    return root


@pytest.fixture
def state(world: Path, tmp_path: Path) -> Path:
    """A copy of `one` to write to."""
    return Path(shutil.copytree(world / "one", tmp_path / "state"))


def pictures(count: int) -> list[Image.Image]:
    names = ("cat", "dog", "fox", "owl", "hen", "cow")
    return [picture(names[i % 6], 100 + i) for i in range(count)]


def ask(client: httpx2.Client, *files: bytes, **query: Any) -> httpx2.Response:
    return client.post("/predict", params=query, files=[("files", (f"{i}.png", one)) for i, one in enumerate(files)])


def shares(answer: dict[str, Any]) -> list[dict[str, float]]:
    """The probabilities of each picture in an answer, by class."""
    return [{c["name"]: c["probability"] for c in one["classes"]} for one in answer["predictions"]]


def offline(state: Path, images: list[Image.Image]) -> list[dict[str, float]]:
    return [dict(one.classes) for one in Learner.load(state).predict(images, top=99)]


def alike(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two answers have the same classes, and probabilities that differ by rounding alone."""
    return one.keys() == other.keys() and all(math.isclose(one[k], other[k], abs_tol=1e-5) for k in one)


def detail(answer: httpx2.Response) -> str:
    """The one line of an answer that refuses."""
    content = answer.json()
    assert list(content) == ["detail"]
    assert len(content["detail"].splitlines()) == 1
    return str(content["detail"])


# -- answers ------------------------------------------------------------------------------------------------


def test_it_answers_as_predict_does(world: Path, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (24, 16, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    files = {
        "plain.png": png(image),
        "turned.jpg": png(image, "JPEG", exif=turned.tobytes()),
        "inks.jpg": png(image.convert("CMYK"), "JPEG"),
        "deep.png": png(Image.fromarray(noise[..., 0].astype(np.uint16) * 200)),
        "moving.gif": png(image.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", image.size)]),
        "clear.png": png(image.convert("RGBA").rotate(45)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    told = Learner.load(world / "three").predict([tmp_path / name for name in files], top=3)
    with running(world / "three") as (client, _):
        answer = client.post("/predict", params={"top": 3}, files=[("files", (n, c)) for n, c in files.items()])
        alone = client.post("/predict", files={"file": ("a\nb", files["plain.png"], "text/html")}).json()
    found = answer.json()
    assert (answer.status_code, found["state"], found["task"]) == (200, 3, "c")
    assert [one["image"] for one in found["predictions"]] == list(files)
    for got, want in zip(shares(found), told, strict=True):
        assert alike(got, dict(want.classes))
    assert len(alone["predictions"][0]["classes"]) == 5
    assert "\n" not in alone["predictions"][0]["image"]


def test_what_it_says_of_itself(world: Path) -> None:
    with running(world / "two") as (client, _):
        ask(client, png(picture("cat", 1)), png(picture("cat", 2)))
        health = client.get("/health")
        metrics = client.get("/metrics").text
        schema = client.get("/openapi.json").json()
        page = client.get("/")
        lost, wrong = client.get("/docs"), client.get("/predict")
    assert health.status_code == 200
    assert {**health.json(), "since": "", "version": ""} == {
        "status": "ok",
        "name": "tiny",
        "state": 2,
        "task": "b",
        "classes": 4,
        "since": "",
        "behind": None,
        "version": "",
    }
    for line in ('perpetune_requests_total{code="200"} 1.0', "perpetune_pictures_total 2.0", "perpetune_state 2.0"):
        assert line in metrics.splitlines()
    assert schema["paths"]["/predict"]["post"]["requestBody"]["content"].keys() == {"multipart/form-data"}
    assert {parameter["name"] for parameter in schema["paths"]["/predict"]["post"]["parameters"]} == {"top", "names"}
    assert (lost.status_code, detail(lost)) == (404, "Not Found")  # FastAPI's page loads scripts from elsewhere
    assert (wrong.status_code, detail(wrong)) == (405, "Method Not Allowed")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import|url\(", page.text)


FORM = {"content-type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
WIDE = png(Image.new("L", (101, 100)))
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "text": ({"files": {"files": ("notes.png", b"no picture")}}, 422, "notes.png: not a picture that Pillow can read"),
    "empty": ({"files": {"files": ("none.png", b"")}}, 422, "none.png: the picture is empty"),
    "torn": ({"files": {"files": ("torn.png", png(picture("cat", 1))[:60])}}, 422, "torn.png: "),
    "wide": ({"files": {"files": ("wide.png", WIDE)}}, 413, "wide.png: has 101 x 100 pixels"),
    "long": ({"content": b"0" * 30_001}, 413, "longer than 30000 bytes"),
    "chunks": ({"content": [PART, *[b"0" * 10_000] * 4], "headers": FORM},
               413, "longer than 30000 bytes"),
    "many": ({"files": [("files", (f"{i}.png", b"x")) for i in range(4)]}, 400, "Too many files"),
    "none": ({"data": {}}, 400, "there is no picture"),
    "json": ({"json": {"files": "a.png"}}, 400, "there is no picture"),
    "field": ({"files": {"photo": ("a.png", b"x")}}, 400, "the field 'photo' is none that is known"),
    "words": ({"files": {"other": ("a.png", b"x")}, "data": {"files": "a.png"}}, 400,
              "the field 'files' holds no file"),
    "torn chunks": ({"content": [b"--x nonsense", *[b"0" * 5_000] * 5], "headers": FORM}, 400,
                    "Invalid multipart data."),
    "torn form": ({"content": b"--x\r\nnonsense", "headers": FORM}, 400, ""),
    "top": ({"params": {"top": 0}, "files": {"files": ("a.png", b"x")}}, 422, "top: "),
    "names": ({"params": {"names": "wren,robin"}, "files": {"files": ("a.png", png(picture("cat", 1)))}}, 400,
              "names need a head that knows classes by their names"),
}  # fmt: skip


def test_what_it_refuses_is_one_line_and_harms_nobody(world: Path) -> None:
    with running(world / "one", max_bytes=30_000, max_pixels=10_000, max_files=3) as (client, _):
        for name, (request, code, line) in REFUSED.items():
            answer = client.post("/predict", **request)
            assert answer.status_code == code, (name, answer.text)
            assert line in detail(answer), name
        assert ask(client, png(picture("cat", 1))).status_code == 200
        counted = client.get("/metrics").text
    assert 'perpetune_requests_total{code="413"} 3.0' in counted
    assert "perpetune_requests_held 0.0" in counted


def test_names_on_a_model_that_knows_them(tmp_path: Path) -> None:
    content = recipe(dual_folder(tmp_path / "clip"), head={"name": "text"}, pet=None, method="frozen")
    learner = Learner(content, tmp_path / "state")
    told = learner.predict([picture("cat", 1)], names=["a bird", "a cat"])
    with running(tmp_path / "state") as (client, _):
        answer = ask(client, png(picture("cat", 1)), names="a bird, a cat").json()
        nothing = ask(client, png(picture("cat", 1)))
        health = client.get("/health")
    assert (answer["state"], answer["task"]) == (0, None)
    assert alike(shares(answer)[0], dict(told[0].classes))
    assert (nothing.status_code, detail(nothing)) == (503, "nothing is learned yet: try again when a task is")
    assert (health.status_code, health.json()["status"]) == (503, "empty")


# -- many requests ------------------------------------------------------------------------------------------


class Gate:
    """Holds the model back until the test lets it go; counts the passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.open, self.sizes = threading.Event(), list[int]()
        real = Trained.predict

        def predict(trained: Trained, images: Any, **options: Any) -> Any:
            self.sizes.append(len(images))
            assert self.open.wait(20)
            return real(trained, images, **options)

        monkeypatch.setattr(Trained, "predict", predict)

    def reached(self, passes: int) -> None:
        end = time.monotonic() + 10
        while len(self.sizes) < passes and time.monotonic() < end:
            time.sleep(0.01)
        assert len(self.sizes) >= passes


def test_requests_that_come_together_are_one_batch_and_too_many_are_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, files = Gate(monkeypatch), [png(image) for image in pictures(6)]
    with running(world / "three", held=6, batch=64) as (client, state), ThreadPoolExecutor(6) as pool:
        first = pool.submit(ask, client, files[0])
        gate.reached(1)
        others = [pool.submit(ask, client, files[i], files[0], top=6) for i in range(1, 6)]
        while state.service.batcher._queue.qsize() < 5:
            time.sleep(0.01)
        refused = ask(client, files[0])
        gate.open.set()
        answers = [one.result() for one in (first, *others)]
    assert gate.sizes == [1, 10]
    assert [one.status_code for one in answers] == [200] * 6
    want = offline(world / "three", pictures(6))
    for number, one in enumerate(answers[1:], 1):
        assert alike(shares(one.json())[0], want[number])
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "6 requests are inside" in detail(refused)


def test_a_client_that_goes_away_or_waits_too_long_costs_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, file = Gate(monkeypatch), png(picture("cat", 1))
    with running(world / "one", timeout=1.0) as (client, _), ThreadPoolExecutor(2) as pool:
        slow = pool.submit(ask, client, file)
        gate.reached(1)
        with pytest.raises(httpx2.ReadTimeout):  # closes the connection
            client.post("/predict", files={"files": ("a.png", file)}, timeout=0.2)
        late = slow.result()
        gate.open.set()
        assert ask(client, file).status_code == 200
        counted = client.get("/metrics").text
    assert (late.status_code, detail(late)) == (503, "there was no answer within 1 seconds")
    assert "perpetune_gone_total 1.0" in counted
    assert gate.sizes == [1, 1]  # nothing was computed for the one that went away


def test_a_model_that_fails_is_one_line_and_the_next_answer_is_right(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, faults = Trained.predict, iter([ArithmeticError("planted")])

    def predict(trained: Trained, images: Any, **options: Any) -> Any:
        for fault in faults:
            raise fault
        return real(trained, images, **options)

    monkeypatch.setattr(Trained, "predict", predict)
    with running(world / "one") as (client, _):
        broken, right = ask(client, png(picture("cat", 1))), ask(client, png(picture("cat", 1)))
    assert (broken.status_code, right.status_code) == (500, 200)
    assert "the log of the service says why" in detail(broken)
    assert "planted" in caplog.text


# -- commits ------------------------------------------------------------------------------------------------


def test_what_is_half_read_never_answers(world: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the next state is read, the one before answers. The control reads into the model that answers."""
    images = pictures(6)
    want = {n: offline(world / name, images) for n, name in ((1, "one"), (2, "two"))}
    half, go, real = threading.Event(), threading.Event(), State.load

    def load(self: State, method: Any, task: Any = None) -> None:
        real(self, method, task)
        weights = [p.data for p in method.model.head.parameters()]
        for w in weights:
            w.neg_()
        half.set()
        assert go.wait(20)
        for w in weights:
            w.neg_()

    def answers(models: Models) -> tuple[int, list[dict[str, float]]]:
        with models.asked() as served:
            return served.number, [dict(one.classes) for one in served.trained.predict(images, top=99)]

    def matches(models: Models) -> bool:
        number, found = answers(models)
        return all(map(alike, found, want[number]))

    models = Models(state)
    monkeypatch.setattr(State, "load", load)
    for control in (False, True):
        shutil.rmtree(state)
        shutil.copytree(world / ("one" if control else "two"), state)
        half.clear(), go.clear()
        take = models.current.trained._reload if control else partial(models.renew, mark_of(state))
        taking = threading.Thread(target=take)
        taking.start()
        assert half.wait(20)
        assert matches(models) is not control
        go.set()
        taking.join()
        assert control or models.current.number == 2


def test_what_cannot_be_read_is_tried_again_and_the_old_state_answers(world: Path, state: Path) -> None:
    said: list[str] = []
    taken: list[int] = []
    models = Models(state)
    watcher = Watcher(models, 60, lambda served: taken.append(served.number), said.append)
    watcher.look()
    assert (taken, said) == ([], [])
    Learner.load(state).learn(world / "b")
    pack = next((state / "tasks" / "0001-b").glob("pack*.safetensors"))
    good = pack.read_bytes()
    pack.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    for _ in range(4):
        watcher.look()
    assert (taken, len(said), models.current.number) == ([], 1, 1)
    assert re.search("0001-b.*pack", said[0])
    with models.asked() as served:
        assert served.trained.method.classes == ["cat", "dog"]
        served.trained.predict([picture("cat", 1)])
    pack.write_bytes(good)
    watcher.look()
    assert (taken, said[1:], watcher.behind) == ([2], [""], "")
    State(state).rollback("a")
    watcher.look()
    assert (taken, models.current.task) == ([2, 1], "a")
    assert all(map(alike, [dict(p.classes) for p in models.current.trained.predict(pictures(3), top=9)],
                   offline(world / "one", pictures(3))))  # fmt: skip


def test_a_commit_while_it_starts_is_taken_up(world: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, changes = Trained.load.__func__, iter([True])  # type: ignore[attr-defined]

    def load(cls: type[Trained], folder: Path, **options: Any) -> Trained:
        trained: Trained = real(cls, folder, **options)
        for _ in changes:
            real(Learner, folder).learn(world / "b")
        return trained

    monkeypatch.setattr(Trained, "load", classmethod(load))
    models = Models(state)
    assert models.current.number == 2
    assert models.current.trained.method.classes == ["cat", "dog", "fox", "owl"]


def test_the_two_models_share_what_is_frozen_and_nothing_else(world: Path, state: Path) -> None:
    models = Models(state)
    first, second = models.current.trained, models._spare
    assert second is not None
    ours, theirs = (dict(x.backbone.net.named_parameters()) for x in (first, second))
    shared = {name for name in ours if ours[name].data_ptr() == theirs[name].data_ptr()}
    assert {name for name in ours if ".pets." in name} == ours.keys() - shared
    assert shared


def test_a_service_takes_up_a_relocated_state(world: Path, state: Path) -> None:
    models, watcher = Models(state), None
    watcher = Watcher(models, 60, lambda served: None)
    watcher.look()
    shutil.copytree(world / "model", state.parent / "elsewhere")
    Learner.relocate(state, model=f"folder:{state.parent / 'elsewhere'}")
    watcher.look()
    assert watcher.failures == 0
    Learner.load(state).learn(world / "b")
    watcher.look()
    assert models.current.number == 2
    assert models.current.trained.recipe.backbone.name.endswith("elsewhere")


def test_refresh_refuses_another_recipe(world: Path, state: Path) -> None:
    learner = Learner.load(state)
    path = state / "recipe.yaml"
    path.write_text(path.read_text().replace("name: tiny", "name: other"))
    with pytest.raises(StateError, match="its recipe or its model was changed"):
        learner.refresh()


def start(warm: Warm, *arguments: Any) -> tuple[subprocess.Popen[str], str]:
    """`perpetune serve` as a process, and its URL."""
    command = [*warm.command, "-m", "perpetune", "serve", *map(str, arguments), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    serving = json.loads(line)
    assert serving["event"] == "serving"
    return process, serving["url"]


def test_an_update_beside_the_load_drops_no_request(warm: Warm, world: Path, state: Path) -> None:
    images = pictures(24)
    files = [png(image) for image in images]
    want = {n: offline(world / name, images) for n, name in ((1, "one"), (2, "two"))}
    process, url = start(warm, state, "--poll", "0.1")
    seen: list[tuple[int, int, dict[str, Any]]] = []
    updating = subprocess.Popen(
        [*warm.command, "-m", "perpetune", "update", str(state), "--data", str(world / "b"), "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )

    def work(number: int) -> None:
        with httpx2.Client(base_url=url, timeout=30) as client:
            asked = 0
            while asked < 38 or (updating.poll() is None and asked < 1000):
                i = (number * 7 + asked) % len(files)
                answer = ask(client, files[i], top=99)
                seen.append((i, answer.status_code, answer.json()))
                asked += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert updating.wait(60) == 0
    with httpx2.Client(base_url=url) as client:
        while client.get("/health").json()["state"] != 2:
            time.sleep(0.05)
        seen += [(i, 200, ask(client, files[i], top=99).json()) for i in range(4)]
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"event": "taken", "state": 2, "task": "b"},
        {"event": "done"},
    ]
    assert len(seen) >= 300
    assert {code for _, code, _ in seen} == {200}
    wrong = [(i, found) for i, _, found in seen if not alike(shares(found)[0], want[found["state"]][i])]
    assert wrong == []
    assert {found["state"] for _, _, found in seen} == {1, 2}


def test_a_signal_ends_it_after_the_requests_that_it_holds(warm: Warm, world: Path) -> None:
    process, url = start(warm, world / "three")
    body = [
        b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n",
        png(picture("cat", 1)),
        b"\r\n--x--\r\n",
    ]
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as link:
        head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        link.sendall(f"{head}Content-Length: {sum(map(len, body))}\r\n\r\n".encode() + body[0])
        httpx2.get(url + "/health")
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 10
        while time.monotonic() < end:  # no new connection is taken any more
            try:
                socket.create_connection((host, int(port)), 1).close()
                time.sleep(0.05)
            except OSError:
                break
        link.sendall(body[1] + body[2])
        assert link.recv(15) == b"HTTP/1.1 200 OK"
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err, json.loads(out)) == (0, "", {"event": "done"})


# -- the command --------------------------------------------------------------------------------------------


def failed(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """The exit code and the one line of a command."""
    code = call(["serve", *map(str, arguments)])
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    return code, err


def test_what_the_command_refuses(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bound("127.0.0.1", 0) as held:
        held.listen()
        port = held.getsockname()[1]
        assert failed(capfd, world / "one", "--port", port) == (
            2, f"perpetune: port {port} of 127.0.0.1 is in use: choose another --port, or 0 for a free one\n"
        )  # fmt: skip
    code, line = failed(capfd, world / "one", "--host", "no.such.host.invalid")
    assert (code, "--host no.such.host.invalid: " in line) == (2, True)
    code, line = failed(capfd, tmp_path / "none", "--port", 0)
    assert (code, "none does not exist" in line) == (1, True)
    assert failed(capfd, world / "one", "--port", 70000)[0] == 2
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "perpetune.serve.server")
    monkeypatch.delitem(sys.modules, "perpetune.serve.app")
    assert failed(capfd, world / "one") == (
        1, "perpetune: perpetune serve needs a package that is not installed: pip install 'perpetune[serve]'\n"
    )  # fmt: skip


def test_a_language_model_is_exported_instead(tmp_path: Path) -> None:
    content = recipe(tiny_language_model(tmp_path / "lm"), head="lm", stream={})
    Learner(content, tmp_path / "notes")
    with pytest.raises(UsageError, match=r"holds a language model.*perpetune export .*notes ADAPTER.*vllm serve"):
        Models(tmp_path / "notes")


# -- the page -----------------------------------------------------------------------------------------------

DROP = """
(async () => {
  const bytes = Uint8Array.from(atob("CONTENT"), (c) => c.charCodeAt(0));
  const given = new DataTransfer();
  given.items.add(new File([bytes], "NAME", { type: "image/png" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
})()
"""


@pytest.mark.browser
def test_a_picture_is_dropped_on_the_page(world: Path, tmp_path: Path, chromium: str) -> None:
    image = picture("cat", 1)
    bird = '<i>"cat" & dog</i>.png'
    want = sorted(offline(world / "three", [image])[0].items(), key=lambda pair: -pair[1])
    content = base64.b64encode(png(image)).decode()
    with running(world / "three") as (client, _), browsing(chromium, tmp_path / "profile") as browser:
        for width, dark in ((1300, False), (400, True)):
            browser.go(f"{client.base_url}/", width, dark=dark)
            assert browser.until(
                "document.querySelector('#state').textContent.includes('3 tasks learned, the last one c; 6 classes')"
            )
            browser.value(DROP.replace("CONTENT", content).replace('"NAME"', json.dumps(bird)))
            browser.until("document.querySelectorAll('#found li').length === 1")
            rows = browser.value("[...document.querySelectorAll('#found ol div[role]')].map((row) => row.innerText)")
            assert [row.split("\n")[0] for row in rows] == [name for name, _ in want[:5]]
            assert rows[0].endswith(f"{100 * want[0][1]:.1f} %")
            assert browser.value("document.querySelector('#found h2').textContent") == bird
            bar = "document.querySelector('#found .bar').getBoundingClientRect().width"
            full = browser.value(f"document.querySelector('#found .bar i').getBoundingClientRect().width / {bar}")
            assert full == pytest.approx(want[0][1], abs=0.01)
            browser.until("document.querySelector('#found img').naturalWidth === 16")
            assert browser.value("document.documentElement.scrollWidth") <= width
            browser.value(DROP.replace("CONTENT", "bm8=").replace("NAME", "notes.txt"))
            browser.until("document.querySelector('#said.bad') !== null")
            assert (
                browser.value("document.querySelector('#said').textContent")
                == "notes.txt: not a picture that Pillow can read"
            )
            browser.shoot(tmp_path / f"{width}.png")
        outside = [
            url for url in browser.asked if not url.startswith((str(client.base_url), "blob:", "about:", "data:"))
        ]
        assert outside == []
        assert [line for line in browser.console if "422" not in line] == []  # chromium tells of the refused picture
        browser.value("console.log('seen')")
        assert "seen" in "".join(browser.console)  # so the silence above means something
