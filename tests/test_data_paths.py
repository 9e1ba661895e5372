"""Relative paths go by the file that they stand in: a recipe, one that it extends, a parquet file."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import picture_folder, vit_folder

from perpetune import Learner
from perpetune.cli import call
from perpetune.data.pictures.arrow import ParquetSource
from perpetune.errors import DataError
from perpetune.recipe import load_recipe

BASE = {"backbone": "perpetune:micro", "pet": "none", "method": "frozen", "head": "ncm", "run": {"device": "cpu"}}
STREAM = {"by": "class", "classes_per_task": 2, "holdout": 0.3}


def written(path: Path, **content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """The folder where the command runs, `here`, with `there` beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    picture_folder(tmp_path / "there" / "pics", ["a", "b"], 4)
    return tmp_path / "there"


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_paths_in_a_recipe_go_by_its_file(there):
    exams = {
        "kept": {"name": "dataset", "source": "pics"},
        "more": {"name": "dataset", "source": {"name": "folder", "path": "pics"}},
    }
    file = written(
        there / "r.yaml",
        **{**BASE, "pet": "lora", "method": "finetune", "head": "linear"},
        data={"name": "folder", "path": "pics", "test": "./pics"},
        exams=exams,
        protect={"reference": {"path": "../there/pics"}},
    )
    full = str(there / "pics")
    for name in (file, Path("../there/r.yaml")):
        recipe = load_recipe(name)
        assert None not in (recipe.data, recipe.protect)
        assert (recipe.data.options["path"], recipe.data.options["test"]) == (full, full)
        assert recipe.exams["kept"].options["source"] == full
        assert recipe.exams["more"].options["source"] == {"name": "folder", "path": full}
        assert recipe.protect.reference.path == full


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("prefix", ["folder", "hf"])
def test_a_model_folder_goes_by_the_file(there, prefix, short):
    vit_folder(there / "vit")
    backbone = f"{prefix}:vit" if short else {"name": f"{prefix}:./vit"}
    recipe = load_recipe(written(there / "r.yaml", **{**BASE, "backbone": backbone}))
    assert recipe.backbone.name == f"{prefix}:{there / 'vit'}"


def test_each_recipe_goes_by_its_own_file(there, tmp_path):
    written(there / "base.yaml", **BASE, data={"name": "folder", "path": "pics"}, stream=STREAM)
    file = written(tmp_path / "own" / "r.yaml", extends="../there/base.yaml")
    assert load_recipe(file).data.options["path"] == str(there / "pics")
    picture_folder(tmp_path / "own" / "mine", ["c", "d"], 4)
    file = written(tmp_path / "own" / "r.yaml", extends="../there/base.yaml", data={"path": "mine"})
    assert load_recipe(file).data.options["path"] == str(tmp_path / "own" / "mine")
    picture_folder(tmp_path / "here" / "cwd", ["c", "d"], 4)
    changed = load_recipe(file, ["data.path=cwd"])  # of the command line: where it runs
    assert changed.anchored().data.options["path"] == str(tmp_path / "here" / "cwd")


def test_recipes_of_earlier_versions_work_with_a_warning(there, tmp_path):
    picture_folder(tmp_path / "here" / "cwd", ["a", "b"], 5)
    file = written(there / "r.yaml", **BASE, data={"name": "folder", "path": "cwd"}, stream=STREAM)
    with pytest.warns(
        UserWarning, match=r"data.path 'cwd' is not beside the recipe, and is taken from the folder where"
    ):
        recipe = load_recipe(file)
    assert len(Learner(recipe).stream.tasks) == 1
    picture_folder(tmp_path / "here" / "pics", ["a", "b", "c", "d"], 5)  # in both places: the file's own
    file = written(there / "r.yaml", **BASE, data={"name": "folder", "path": "pics"}, stream=STREAM)
    assert load_recipe(file).data.options["path"] == str(there / "pics")


def test_names_of_splits_are_no_paths(there, tmp_path):
    for root in (there, tmp_path / "here"):
        (root / "train").mkdir()
    file = written(there / "r.yaml", **BASE, data={"name": "hf", "path": "x/y", "train": "train", "test": "train"})
    options = load_recipe(file).anchored().data.options
    assert (options["path"], options["train"], options["test"]) == ("x/y", "train", "train")


def test_a_run_from_another_folder(there, capfd):
    written(there / "r.yaml", **BASE, data={"name": "folder", "path": "pics"}, stream=STREAM)
    assert call(["run", "../there/r.yaml", "--out", "s", "--quiet"]) == 0
    assert (Path("s") / "recipe.yaml").read_text().count(str(there / "pics")) == 1


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def reds(table) -> list[int]:
    return [table.open(i).getpixel((0, 0))[0] for i in range(len(table))]


def test_paths_in_parquet_files_go_by_the_file(there, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for root, shade in ((there, 10), (there / "more", 20), (tmp_path / "here", 30)):
        (root / "im").mkdir(parents=True)
        (root / "im" / "0.png").write_bytes(png(shade))
    (tmp_path / "here" / "im" / "old.png").write_bytes(png(40))
    cells = [{"bytes": None, "path": "im/0.png"}, {"bytes": png(5), "path": "im/none.png"}]
    rows = pa.table({"image": cells, "label": ["a", "b"]})
    for path in (there / "a.parquet", there / "more" / "b.parquet"):
        pq.write_table(rows, path)
    source = ParquetSource(path=[str(there / "a.parquet"), "../there/more/b.parquet"])
    assert reds(source.train()) == [10, 5, 20, 5]
    assert source.train().warnings == []
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "im/old.png"}], "label": ["a"]}), there / "c.parquet")
    table = ParquetSource(path=str(there / "c.parquet")).train()
    assert reds(table) == [40]
    (warning,) = table.warnings
    assert "im/old.png is not beside the file, and is taken from the folder where the command runs" in warning


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_a_column_of_plain_paths_in_parquet_files(there, tmp_path, kind, monkeypatch):
    """They go by the file as paths in `{bytes, path}` do, and pictures that are not there are named."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for root, shade in ((there, 10), (tmp_path / "here", 30)):
        (root / "im").mkdir(parents=True, exist_ok=True)
        (root / "im" / "0.png").write_bytes(png(shade))
    monkeypatch.chdir(tmp_path / "here")
    paths = pa.array(["im/0.png", str(tmp_path / "here" / "im" / "0.png"), "im/none.png", None])
    cells = paths.dictionary_encode() if kind == "dictionary" else paths.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"image": cells, "label": list("abab")}), there / "a.parquet")
    table = ParquetSource(path=str(there / "a.parquet")).train()
    assert [table.open(i).getpixel((0, 0))[0] for i in (0, 1)] == [10, 30]
    assert table.name(0).endswith("a.parquet row 0 (im/0.png)")
    assert table.warnings == []
    for i in (2, 3):
        with pytest.raises(DataError, match=rf"a\.parquet row {i}") as caught:
            table.check(i, "decode")
        assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"image": [1, 2], "label": ["a", "b"]}), there / "n.parquet")
    with pytest.raises(DataError, match=r"column 'image' is int64; expected .* binary or \{bytes, path\}, or paths"):
        ParquetSource(path=str(there / "n.parquet")).train()
