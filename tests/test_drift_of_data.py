"""New data without labels against what was learned: months of the same kind pass, others are seen."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from test_faults import one_line
from test_gate import everything, month
from tiny import picture_folder, recipe, tiny_language_model, vit_folder
from torch import Tensor
from warm import Warm

from perpetune import drifting
from perpetune.cli import call
from perpetune.errors import DataError, StateError, UsageError
from perpetune.learner import Learner
from perpetune.numerics.two_samples import beyond, draws_for, energy_test, far_test, for_this, scaled
from perpetune.seeding import generator
from perpetune.state import State


def compared_with(learner: Learner) -> dict[str, Tensor]:
    """What `drift` compares with."""
    return drifting.known(learner.method, learner.state.committed, learner._tasks.past, pytest.fail)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drift")
    month(root / "learned", 60, 0)
    month(root / "same", 10, 500)
    content = recipe(vit_folder(root / "vit"), pet="none", method="frozen", head="ncm", stream={})
    Learner(content, root / "state").learn(root / "learned", holdout=0.5)
    picture_folder(root / "others", ["zebra"], 40)
    (root / "torn.csv").write_text("what,is,this\n1,2,3\n")
    return root


def test_the_command(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = everything(world / "state")
    command = ["drift", str(world / "state"), "--data"]
    assert call([*command, str(world / "same")]) == 0
    assert "no drift: 40 images look like what was learned (120 held-out ones; level 0.05)" in capfd.readouterr().out
    assert call([*command, str(world / "others"), "--json"]) == 4
    found = json.loads(capfd.readouterr().out)
    assert found["drift"]
    assert found["tests"]["features"]["chance"] < 0.05
    assert found == Learner.load(world / "state").drift(world / "others")
    assert call([*command, str(world / "others")]) == 4
    assert "drift: 40 images do not look like what was learned" in capfd.readouterr().out
    assert everything(world / "state") == before


def test_the_process_says_it_by_its_exit_code(world: Path, warm: Warm) -> None:
    for name, code in (("same", 0), ("others", 4)):
        command = [*warm.command, "-m", "perpetune", "drift", str(world / "state"), "--data", str(world / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, "")
        assert done.stdout.splitlines()[-1].startswith("drift: " if code else "no drift: ")


def test_bad_input(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["drift", str(world / "state"), "--data"]
    for more, code, says in (
        ([str(tmp_path / "nowhere")], 1, "nowhere: no such file or folder"),
        ([str(world / "torn.csv")], 1, "torn.csv"),
        ([str(world / "same"), "--level", "2"], 2, "a share from 0.005 to 0.5 is expected"),
        ([str(world / "same" / "cat")], 1, "10 images are too few to tell: 20 are needed"),
    ):
        assert call([*command, *more]) == code
        assert says in one_line(capfd.readouterr().err)
    copies = [world / "same" / "cat" / "500.png"] * 30
    with pytest.raises(DataError, match="1 different images are too few to tell"):
        Learner.load(world / "state").drift(copies)
    content = recipe(world / "vit", pet="none", method="frozen", head="ncm", stream={})
    few = Learner(content, tmp_path / "few")
    few.learn(world / "same", holdout=0.1)
    with pytest.raises(StateError, match="keeps features of 4 held-out images, which are too few"):
        few.drift(world / "learned")


@pytest.mark.parametrize("form", ["csv", "captions", "parquet", "data set"])
def test_whatever_an_update_takes(form: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Tables and saved data sets, of which the labels are not looked at: the same pictures give the same distances."""
    from datasets import Dataset, Features, Image, Value

    found = {}
    for name in ("same", "others"):
        files = sorted((world / name).rglob("*.png"))
        rows = [{"image": str(file), "label": f"odd {i % 3}"} for i, file in enumerate(files)]
        path = tmp_path / f"{name}.{'jsonl' if form == 'captions' else form}"
        more = ["--set", "path_column=image"] if form == "csv" else []
        if form == "csv":  # without a column of labels
            path.write_text("".join(f"{row}\n" for row in ["image", *(row["image"] for row in rows)]))
        elif form == "captions":
            path.write_text("".join(f"{json.dumps({'image': row['image'], 'caption': 'a bird'})}\n" for row in rows))
        else:
            table = Dataset.from_list(rows, features=Features({"image": Image(), "label": Value("string")}))
            table.to_parquet(path) if form == "parquet" else table.save_to_disk(path)
            capfd.readouterr()
        code = call(["drift", str(world / "state"), "--data", str(path), "--json", *more])
        out, err = capfd.readouterr()
        assert one_line(err) == f"perpetune: note: labels, answers and captions in {path} are not looked at"
        found[name] = json.loads(out)
        assert code == (4 if name == "others" else 0)
    whole = Learner.load(world / "state").drift(world / "same")
    assert found["same"]["examples"] == whole["examples"] == 40
    assert found["same"]["tests"]["features"]["distance"] == pytest.approx(
        whole["tests"]["features"]["distance"], abs=1e-5
    )
    assert found["same"]["tests"]["far"]["share"] == pytest.approx(whole["tests"]["far"]["share"])


def test_what_is_kept(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of held-out pictures, in 16 bits, those that the net makes of them; of an older version fewer."""
    (task,) = State(world / "state").committed
    files = task.read(drifting.SAMPLE, drifting.FEATURES)
    assert len(files[drifting.SAMPLE]) < 120 * 16 * 2 + 200
    kept = drifting.stored(task)
    learner = Learner.load(world / "state")
    past = learner._tasks.past(task)
    assert past is not None
    assert past.test is not None
    assert kept is not None
    own = learner._compared(
        learner._batch(learner.method.model.view.ask([world / "learned" / past.test.table.key(past.test.rows[7])]))
    )
    assert torch.allclose(kept[7], own[0], atol=2e-3)
    monkeypatch.setattr(drifting, "SAMPLE", "absent")
    older = drifting.stored(task)
    assert older is not None
    assert len(older) == 32


def test_features_that_have_moved_are_made_again(world: Path, tmp_path: Path) -> None:
    """A method that trains moves them: stored ones are of use only as long as they have not."""
    train = {"epochs": 3, "batch_size": 8, "lr": 0.1}
    learner = Learner(recipe(world / "vit", train=train, stream={}), tmp_path / "state")
    learner.learn(world / "learned", holdout=0.5)
    learner.learn(world / "same", holdout=0.5)
    first, last = learner.state.committed
    moved = drifting.moved(first, last)
    assert moved is not None
    assert moved > drifting.MOVED
    stored = drifting.stored(first)
    assert stored is not None
    assert not torch.allclose(compared_with(learner)["learned"], stored, atol=0.01)


def test_texts(tmp_path: Path) -> None:
    model = tiny_language_model(tmp_path / "model")
    rng = np.random.default_rng(0)
    words = ["paris", "france", "capital", "good", "bad", "fox", "dog", "lazy"]

    def prompts(path: Path, known: list[str], count: int) -> Path:
        rows = [{"prompt": " ".join(rng.choice(known, 6)), "answer": "good"} for _ in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    content = {
        "backbone": f"hf:{model}",
        "pet": "none",
        "method": "frozen",
        "head": "lm",
        "train": {"epochs": 1},
        "stream": {},
        "run": {"device": "cpu"},
    }
    learner = Learner(content, tmp_path / "state")
    learner.learn(prompts(tmp_path / "a.jsonl", words, 80), holdout=0.5)
    assert not learner.drift(prompts(tmp_path / "b.jsonl", words, 40))["drift"]
    assert learner.drift(prompts(tmp_path / "c.jsonl", ["0123", "4567", "89?!"], 40))["drift"]
    for name, known in (("d", words), ("e", ["0123", "4567", "89?!"])):  # a folder, as `update` takes one
        (tmp_path / name).mkdir()
        prompts(tmp_path / name / "train.jsonl", known, 30)
        prompts(tmp_path / name / "test.jsonl", known, 10)
        found = learner.drift(tmp_path / name)
        assert (found["drift"], found["examples"]) == (name == "e", 40)


# -- the level ----------------------------------------------------------------------------------------------


def flagged(known: Tensor, months: list[Tensor]) -> float:
    return sum(drifting.compare(known, m, ["x"] * len(m), 0.05, "images")["drift"] for m in months) / len(months)


def test_at_most_one_of_twenty_months_is_flagged_for_any_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several states, each with a sample of its own: the rate holds for each of them, not only on average. The control:
    the chances of the tests as they are, which hold on average, flag more of one state's months."""
    drawn = generator("months")
    states = [torch.randn(32, 8, generator=drawn) for _ in range(5)]
    months = [[torch.randn(60, 8, generator=drawn) for _ in range(20)] for _ in states]
    monkeypatch.setattr(drifting, "draws_for", lambda level: 999)
    rates = [flagged(*pair) for pair in zip(states, months, strict=True)]
    assert max(rates) <= 0.05
    shifted = [m + 0.8 for m in months[0]]
    assert flagged(states[0], shifted) >= 0.95
    monkeypatch.setattr(drifting, "for_this", lambda chance, n, m: chance)
    assert max(flagged(*pair) for pair in zip(states, months, strict=True)) > 0.05


@pytest.mark.slow
def test_months_of_digits(tmp_path: Path) -> None:
    """The packaged model and recipe learn eight digits. Of 200 months of 100 more of them at most 5 % are flagged;
    inverted and blurred ones, and the two other digits, in at least 95 % of 40."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    shown = [Image.fromarray(np.round(d * (255 / 16)).astype(np.uint8)).convert("RGB") for d in digits.images]
    order = torch.randperm(len(shown), generator=generator("digits")).tolist()
    known, new = ([i for i in order if (digits.target[i] < 8) == which] for which in (True, False))
    for i in known[:700]:
        (tmp_path / "learned" / str(digits.target[i])).mkdir(parents=True, exist_ok=True)
        shown[i].save(tmp_path / "learned" / str(digits.target[i]) / f"{i}.png")
    learner = Learner("update", tmp_path / "state")
    learner.learn(tmp_path / "learned", holdout=0.3)
    kept = torch.cat(list(compared_with(learner).values()))

    def features(pictures: list[Any]) -> Tensor:
        view, parts = learner.method.model.view, []
        for start in range(0, len(pictures), 64):
            parts.append(learner._compared(learner._batch(view.ask(pictures[start : start + 64]))))
        return torch.cat(parts)

    def months(of: Tensor, count: int) -> list[Tensor]:
        drawn = generator("months", count, len(of))
        return [of[torch.randperm(len(of), generator=drawn)[:100]] for _ in range(count)]

    rest = [shown[i] for i in known[700:]]
    assert flagged(kept, months(features(rest), 200)) <= 0.05
    assert flagged(kept, months(features([ImageOps.invert(p) for p in rest[:300]]), 40)) >= 0.95
    assert flagged(kept, months(features([p.filter(ImageFilter.GaussianBlur(1)) for p in rest[:300]]), 40)) >= 0.95
    assert flagged(kept, months(features([shown[i] for i in new[:300]]), 40)) >= 0.95


def test_tests_of_two_samples() -> None:
    drawn = generator("two samples")
    first, second = torch.randn(40, 5, generator=drawn), torch.randn(30, 5, generator=drawn)
    distance, chance = energy_test(first, second, 500, generator("ways"))
    across = torch.cdist(first, second).mean()
    expected = 2 * across - torch.cdist(first, first).mean() - torch.cdist(second, second).mean()
    assert distance == pytest.approx(float(expected), abs=1e-5)
    assert chance > 0.05
    assert energy_test(first, second + 3, 500, generator("ways"))[1] == 1 / 501
    far, many = far_test(first, torch.cat([second, second + 9]))
    assert far[30:].all()
    assert many < 1e-6
    assert beyond(0, 50, 3, 40) == pytest.approx(1)
    # of 2 values beyond the largest of 3 others, all orders alike: both with chance 1 in 10
    assert beyond(2, 2, 1, 3) == pytest.approx(1 / 10)
    assert for_this(0.05, 100, 1) == pytest.approx(0.05, abs=0.05)
    assert for_this(0.001, 50, 100) > 0.001
    assert draws_for(0.025) > 1000
    constant = torch.cat([first, torch.ones(40, 1)], 1), torch.cat([second, torch.ones(30, 1)], 1)
    assert not scaled(*constant)[0][:, -1].any()


def test_levels() -> None:
    for level in (0, 1, float("nan"), 0.001):
        with pytest.raises(UsageError, match=r"a share from 0\.005 to 0\.5"):
            drifting.check_level(level)
