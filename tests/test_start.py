"""A prediction imports only what it uses, the packaged model is that of transformers to the bit, and a picture is
decoded once where its pixels are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import perpetune
from perpetune.build import load_backbone
from perpetune.data.pictures import kept, read
from perpetune.data.pictures.tables import FileTable
from perpetune.data.pictures.view import PictureSet, PictureView
from perpetune.data.stream import StreamOptions, single_task
from perpetune.models.loaders import vit
from perpetune.runtime import LAUNCHED, Runtime

HEAVY = ("transformers", "timm", "torchvision", "accelerate", "pyarrow", "datasets", "jinja2", "sklearn", "scipy",
         "pandas", "peft", "open_clip", "torch._dynamo", "sympy", "huggingface_hub")  # fmt: skip
WATCHED = f"""
import json, sys
from perpetune import cli
code = cli.call(sys.argv[1:])
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
sys.exit(code)
"""


def _photo(path: Path, size: tuple[int, int] = (40, 30), **how: Any) -> Path:
    tiny.picture("a", 1).resize(size).save(path, **how)
    return path


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    tiny.picture_folder(folder / "data", ("a", "b"), 3)
    learner = perpetune.Learner({"method": "frozen", "pet": None, "head": "ncm", "name": "s"}, folder / "state")
    learner.learn(folder / "data", holdout=0.0)
    return folder / "state"


def _loaded(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_predict_imports_nothing_heavy(state: Path, tmp_path: Path) -> None:
    assert _loaded("predict", str(state), str(_photo(tmp_path / "x.png"))) == set()


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    folder = str(files("perpetune") / "assets" / "micro-vit")
    return load_backbone("perpetune:micro"), vit.load("perpetune:micro", folder)


def test_the_packaged_model_is_that_of_transformers(both: tuple[Any, Any]) -> None:
    plain, theirs = both
    assert type(plain.net).__name__ == "PlainViT"
    assert type(theirs.net).__name__ == "ViTModel"
    assert [name for name, _ in plain.net.named_parameters()] == [name for name, _ in theirs.net.named_parameters()]
    assert plain.fingerprint() == theirs.fingerprint()
    assert (plain.preprocess, plain.opens, plain.roles()) == (theirs.preprocess, theirs.opens, theirs.roles())
    assert "transformers" in [name for name in HEAVY if name in sys.modules]  # the control: such an import is seen


@pytest.mark.parametrize(("count", "half"), [(1, False), (3, False), (1, True)])
def test_its_features_and_gradients_are_the_same_to_the_bit(both: tuple[Any, Any], count: int, half: bool) -> None:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for backbone in both:
        weights = list(backbone.net.requires_grad_(True).parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            features = backbone.features(pixels)
        found.append([features.detach(), *torch.autograd.grad(features.float().square().sum(), weights)])
        backbone.net.requires_grad_(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    other = both[0].features(255 - pixels)
    assert not torch.equal(other.to(found[0][0].dtype), found[0][0])  # the control


def test_other_forms_of_the_packaged_model_come_from_transformers() -> None:
    assert type(load_backbone("perpetune:micro", image_size=16).net).__name__ == "ViTModel"
    assert type(load_backbone("perpetune:micro", pretrained=False).net).__name__ == "ViTModel"


def test_one_process_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    alone = Runtime()
    assert (alone.rank, alone.world) == (0, 1)
    assert "accelerator" not in vars(alone)
    monkeypatch.setenv("WORLD_SIZE", "1")  # the control: a launcher says so, and accelerate decides
    asked = Runtime()
    assert (asked.rank, asked.world) == (0, 1)
    assert "accelerator" in vars(asked)


# -- decoded once ------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that were decoded."""
    names: list[str] = []
    real = read._read

    def counted(source: str | bytes, name: str, pixels: bool, **limits: int | None) -> Any:
        if pixels:
            names.append(Path(name).name)
        return real(source, name, pixels, **limits)

    monkeypatch.setattr(read, "_read", counted)
    return names


def _task(folder: Path, **options: Any) -> Any:
    from perpetune.data.pictures.folder import FolderSource

    if not folder.exists():
        tiny.picture_folder(folder, ("a", "b"), 4)
    view = PictureView(8)
    return single_task(
        FolderSource(path=str(folder)), StreamOptions(**options), view, index=0, name="t", seed=0, holdout=0.25
    )


def _passes(task: Any, count: int) -> None:
    for _ in range(count):
        for part in (task.train, task.test):
            for i in range(len(part)):
                part.load(i, 7)


def test_each_picture_is_decoded_once(tmp_path: Path, decoded: list[str]) -> None:
    task = _task(tmp_path / "data")
    task.check()
    _passes(task, 3)
    assert len(decoded) == 8


@pytest.mark.parametrize("augment", ["flip", "crop", "crop_flip"])
def test_a_picture_that_is_changed_at_random_is_decoded_once(augment: str, tmp_path: Path, decoded: list[str]) -> None:
    checked, fresh = _task(tmp_path / "data", augment=augment), _task(tmp_path / "data", augment=augment, check="none")
    checked.check()
    _passes(checked, 3)
    assert len(decoded) == 8
    seeds = (None, *range(8))
    found, wanted = ([task.train.load(i, seed) for i in (0, 1) for seed in seeds] for task in (checked, fresh))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(decoded) == 8 + 2 * len(seeds)  # the control: what was not checked is decoded each time
    assert len({one.numpy().tobytes() for one in found[: len(seeds)]}) >= (2 if augment == "flip" else len(seeds))


def test_whole_pictures_have_a_limit_and_bow_to_the_file(tmp_path: Path, decoded: list[str]) -> None:
    task = _task(tmp_path / "data", augment="crop")
    task.train.table.decoded.limit = 2 * 4 * 32 * 32
    task.check()
    assert task.train.table.decoded.bytes <= task.train.table.decoded.limit
    last = len(task.train) - 1
    before = task.train.load(last, 1)
    assert len(decoded) == 8
    _photo(Path(task.train.table.encoded(task.train.rows[last])))
    assert not torch.equal(task.train.load(last, 1), before)
    assert len(decoded) == 9


def test_kept_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    checked, fresh = _task(tmp_path / "data"), _task(tmp_path / "data", check="none")
    checked.check()
    fresh.check()
    assert checked.train.table.kept.bytes == 8 * 3 * 8 * 8
    assert fresh.train.table.kept.bytes == 0
    for i in range(len(fresh.train)):
        assert torch.equal(checked.train.load(i, 1), fresh.train.load(i, 1))


def test_a_changed_file_is_read_again_and_a_lost_one_is_named(tmp_path: Path, decoded: list[str]) -> None:
    task = _task(tmp_path / "data")
    task.check()
    first, second = (Path(task.train.table.encoded(task.train.rows[i])) for i in (0, 1))
    before = task.train.load(0, None)
    _photo(first)
    assert not torch.equal(task.train.load(0, None), before)
    assert len(decoded) == 9
    second.unlink()
    with pytest.raises(perpetune.PerpetuneError, match=second.name):
        task.train.load(1, None)


def test_what_is_kept_has_a_limit() -> None:
    pixels = [torch.full((10,), i, dtype=torch.uint8) for i in range(5)]
    store = kept.Kept(limit=30)
    for i, one in enumerate(pixels):
        store.put(i, (), one)
    store.put("large", (), torch.zeros(31, dtype=torch.uint8))
    store.put("lost", None, pixels[0])
    there = [i for i in (*range(5), "large", "lost") if store.get(i, lambda _: (), 0) is not None]
    assert (there, store.bytes) == ([2, 3, 4], 30)
    store.put(4, (), pixels[0])  # the same key once more
    assert (store.bytes, store.get(4, lambda _: (), 0)) == (30, pixels[0])


def test_a_copy_for_another_process_is_empty() -> None:
    import copy

    store = kept.Kept(limit=30)
    store.put(0, (), torch.zeros(10, dtype=torch.uint8))
    other = copy.deepcopy(store)
    assert (other.bytes, other.limit) == (0, 30)


def test_a_table_of_another_package_keeps_its_own_check(tmp_path: Path, decoded: list[str]) -> None:
    class Own(FileTable):
        seen: list[int] = []  # noqa: RUF012

        def check(self, i: int, depth: Any) -> None:
            self.seen.append(i)

    file = _photo(tmp_path / "x.png")
    table = Own("", [str(file)], ["a"])
    PictureSet(table, [0], ["a"], PictureView(8)).look(0, "decode")
    assert (table.seen, decoded) == ([0], [])
