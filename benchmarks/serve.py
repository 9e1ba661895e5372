"""Load on `perpetune serve` while two updates are committed beside it.

    python benchmarks/serve.py --requests 5000 --clients 16

It makes a state of the packaged model that has learned four handwritten digits, serves it in a process of its own, and
lets clients ask for one picture after the other, each over a connection of its own. Beside them two processes
`perpetune update` learn three digits each. If the updates take longer, the clients go on until they are committed.
Every answer is then compared with what `Learner.predict` says of a copy of the state with that number.

Prints JSON: latencies, requests a second, failed requests, answers by state, answers that are wrong, and the resident
memory of the service after a twentieth of the requests, at the end, and at its highest.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TASKS = {"zero-three": (0, 1, 2, 3), "four-six": (4, 5, 6), "seven-nine": (7, 8, 9)}
ASKED = 60  # different pictures
NEAR = 1e-4  # how far probabilities may be from those of `Learner.predict`, whose batches are others


def make(root: Path, each: int, size: int) -> list[bytes]:
    """Folders of training pictures, and the pictures that are asked about, as files of `size` pixels a side."""
    images, labels = load_digits(return_X_y=True)
    names = {label: task for task, members in TASKS.items() for label in members}
    asked: list[bytes] = []
    counts: dict[int, int] = {}
    for pixels, label in zip(images, labels, strict=True):
        number = counts[label] = counts.get(label, 0) + 1
        image = Image.fromarray(np.uint8(pixels.reshape(8, 8) * 15.9)).resize((size, size), Image.Resampling.BICUBIC)
        if number <= each:
            folder = root / names[label] / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.png")
        elif len(asked) < ASKED:
            file = io.BytesIO()
            image.save(file, "PNG")
            asked.append(file.getvalue())
    return asked


def perpetune(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "perpetune", *map(str, arguments), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a command failed: {out[-500:]}")


def body_of(content: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return head + content + b"\r\n--x--\r\n"


class Load:
    """Clients that ask until enough is asked and nobody wants them to go on."""

    def __init__(self, port: int, files: list[bytes], requests: int, clients: int):
        self.port, self.bodies, self.requests = port, [body_of(file) for file in files], requests
        self.answers: list[tuple[int, float, float, dict[str, Any]]] = []  # picture, began, seconds, answer
        self.failed: list[str] = []
        self.more = True
        self.threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]

    def _client(self, number: int) -> None:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        asked = number * 7
        while self.more or len(self.answers) < self.requests:
            asked += 1
            picture, began = asked % len(self.bodies), time.perf_counter()
            try:
                link.request(
                    "POST", "/predict?top=10", self.bodies[picture], {"Content-Type": "multipart/form-data; boundary=x"}
                )
                answer = link.getresponse()
                content = json.loads(answer.read())
                if answer.status != 200:
                    raise ValueError(f"{answer.status}: {content}")
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
                link.close()
                continue
            self.answers.append((picture, began, time.perf_counter() - began, content))
        link.close()

    def reached(self, count: int) -> None:
        while len(self.answers) + len(self.failed) < count:
            time.sleep(0.02)


def resident(pid: int, what: str = "VmRSS") -> float | None:
    """MB of memory of a process; None where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))


def wrong(answers: list[tuple[int, float, float, dict[str, Any]]], copies: dict[int, Path], files: list[bytes]) -> int:
    """How many answers are not those of the state that they name."""
    from perpetune import Learner

    images = [Image.open(io.BytesIO(file)) for file in files]
    want = {
        number: [dict(one.classes) for one in Learner.load(copy).predict(images, top=10)]
        for number, copy in copies.items()
    }
    count = 0
    for picture, _, _, answer in answers:
        found = {c["name"]: c["probability"] for c in answer["predictions"][0]["classes"]}
        right = want.get(answer["state"], [{}] * len(files))[picture]
        count += found.keys() != right.keys() or any(abs(found[name] - right[name]) > NEAR for name in right)
    return count


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    named = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "worst": max(seconds)}
    return {name: round(1000 * value, 1) for name, value in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--each", type=int, default=60, help="training pictures of each class")
    parser.add_argument("--size", type=int, default=256, help="side of a picture that is asked about, in pixels")
    parser.add_argument("--model", default="perpetune:micro")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        state, first = root / "state", next(iter(TASKS))
        files = make(root, given.each, given.size)
        finish(perpetune("init", state, "--model", given.model, "--data", root / first, "-q"))
        copies = {1: Path(shutil.copytree(state, root / "copy-1"))}
        service = perpetune("serve", state, "--port", 0)
        assert service.stdout is not None
        port = int(json.loads(service.stdout.readline())["url"].rpartition(":")[2])
        load = Load(port, files, given.requests, given.clients)
        began = time.perf_counter()
        for thread in load.threads:
            thread.start()
        load.reached(given.requests // 20)
        start, updates = resident(service.pid), []
        for number, name in enumerate(list(TASKS)[1:], 2):
            load.reached(given.requests * (2 * number - 3) // 6)
            learning = time.perf_counter()
            finish(perpetune("update", state, "--data", root / name, "-q"))
            updates.append((learning, time.perf_counter()))
            copies[number] = Path(shutil.copytree(state, root / f"copy-{number}"))
        while load.answers[-1][3]["state"] < len(TASKS):
            time.sleep(0.05)
        load.reached(len(load.answers) + given.requests // 20)  # some more of the last state
        load.more = False
        for thread in load.threads:
            thread.join()
        seconds, end, high = time.perf_counter() - began, resident(service.pid), resident(service.pid, "VmHWM")
        service.send_signal(signal.SIGTERM)
        service.communicate()
        beside = [s for _, at, s, _ in load.answers if any(a <= at <= b for a, b in updates)]
        alone = [s for _, at, s, _ in load.answers if not any(a <= at <= b for a, b in updates)]
        by_state: dict[str, int] = {}
        for _, _, _, answer in load.answers:
            by_state[str(answer["state"])] = by_state.get(str(answer["state"]), 0) + 1
        found = {
            "requests": len(load.answers) + len(load.failed),
            "clients": given.clients,
            "cores": os.cpu_count(),
            "failed": len(load.failed),
            "why": load.failed[:3],
            "wrong": wrong(load.answers, copies, files),
            "by_state": by_state,
            "requests_per_s": round(len(load.answers) / seconds, 1),
            "latency_ms": percentiles([s for _, _, s, _ in load.answers]),
            "latency_without_update_ms": percentiles(alone),
            "latency_beside_update_ms": percentiles(beside),
            "update_s": [round(b - a, 1) for a, b in updates],
            "resident_mb": {"start": start, "end": end, "highest": high},
            "exit_code": service.returncode,
        }
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
