"""The model card of an export: what it was made from, on which data, and how good it was when it was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from perpetune._version import __version__
from perpetune.data.names import printable
from perpetune.data.pictures.view import PictureView
from perpetune.models.backbone import Backbone
from perpetune.models.loaders.packaged import PACKAGED
from perpetune.plain import MOST_YAML, Malformed, parse_yaml, read_regular

NOT_KNOWN = "not known"
CARD = "README.md"
TAG = "perpetune"
"""The tag by which a card of ours is known."""
OF_PACKAGE = "apache-2.0"
"""The licence of this package, and so of the models in it."""

PRIVATE = ("data", "exams", "protect", "run")
"""Sections of the recipe that may name files and folders of the user."""

LOAD = {
    "state": """The whole state: it answers, and it can be updated with new data.

```console
perpetune pull REPO FOLDER
perpetune predict FOLDER photo.jpg
```

If the base model lies in another folder there: `perpetune relocate FOLDER --model folder:PATH`. A recipe can name code
of installed packages, so pull from people whom you trust.
""",
    "peft": """The adapter belongs on the base model:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "FOLDER")
```
""",
    "onnx": """`pixels` is uint8 `(batch, 3, S, S)`, RGB, for any batch; the graph normalises them. `image`
in the metadata says how a picture becomes pixels.

```python
import json, onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
(scores,) = session.run(["scores"], {"pixels": pixels})  # (batch, classes); their softmax are the probabilities
```
""",
    "merged": """The folder is a whole model, and no adapter is needed.

```python
{code}
```
""",
}


@dataclass(frozen=True)
class Base:
    """What a card says of the base model. `opens` is as of `Backbone`."""

    spec: str
    fingerprint: str
    takes: str
    licence: str
    opens: Mapping[str, Any] = field(default_factory=dict)


def base_of(backbone: Backbone) -> Base:
    """The base model of an export."""
    return Base(backbone.spec, backbone.fingerprint(), backbone.takes, licence_of(backbone), backbone.opens)


def state_card(folder: Path, known: Mapping[str, Any], results: Mapping[str, Any], day: date, repo: str) -> str:
    """The card of a whole state on the hub. The base model is not loaded for it.

    Args:
        folder: the state.
        known: its `backbone.json`.
        results: its results document.
        day: of the push.
        repo: OWNER/NAME, where the state is put.
    """
    spec = str(known["spec"])
    prefix, _, rest = spec.partition(":")
    place = rest if prefix == "folder" else rest.partition("@")[0] if prefix == "hf" else ""
    licence = OF_PACKAGE if prefix == "perpetune" and rest in PACKAGED else _licence_in(place)
    takes = "pictures" if known.get("examples") == PictureView.noun else "texts"
    base = Base(spec, str(known["fingerprint"]), takes, licence, {"base": place} if place else {})
    load = LOAD["state"].replace(" FOLDER", f" {_plain(folder.name)}").replace("REPO", repo)
    return model_card("state", [], base, results, day, load)


def is_card(path: Path) -> bool:
    """Whether a file is a card that `export` or `push` has written."""
    try:
        _, head, _ = read_regular(path, MOST_YAML).decode(errors="replace").split("---\n", 2)
        given = parse_yaml(head)
    except (ValueError, OSError, Malformed):
        return False
    tags = given.get("tags") if isinstance(given, dict) else None
    return isinstance(tags, list) and TAG in tags


def card_of(backbone: Backbone, results: Mapping[str, Any], day: date) -> Callable[[str, list[str]], str]:
    """What makes the card of an export of a state, from the form and from sentences about what was written."""
    return lambda to, said: model_card(to, said, base_of(backbone), results, day)


def model_card(to: str, said: Sequence[str], base: Base, results: Mapping[str, Any], day: date, load: str = "") -> str:
    """The text of `README.md`, in Markdown with the head that the Hugging Face hub reads.

    Args:
        to: the form of the export, or `state`.
        said: sentences about what was written, such as how it agrees with the state.
        results: the results document of the state.
        day: of the export.
        load: how to load it; by default what stands for the form in `LOAD`.
    """
    recipe, tasks = results["recipe"], results["tasks"]
    classes = list(dict.fromkeys(name for task in tasks for name in task["classes"]))
    model, library = _base(base), base.opens.get("library") or "perpetune"
    top: dict[str, Any] = {"library_name": "peft" if to == "peft" and recipe["pet"] else library}
    if to == "onnx":
        top["library_name"] = "onnx"
    if base.licence != NOT_KNOWN:
        top["license"] = base.licence
    if model is not None and "/" in model and not Path(model).exists() and not Path(model).is_absolute():
        top["base_model"] = model
    if base.takes == "pictures":
        top["pipeline_tag"] = "image-classification"
    top["tags"] = ["continual-learning", TAG]
    shown = {key: value for key, value in recipe.items() if key not in PRIVATE}
    parts = [
        f"---\n{yaml.safe_dump(top, sort_keys=False).strip()}\n---\n",
        f"# {_plain(results['name'])}\n",
        f"perpetune {__version__} wrote this folder on {day.isoformat()}, in the form `{to}`.\n",
        "## Model\n",
        f"* Base model: `{_plain(base.spec)}`, {results['backbone_parameters']:,} parameters, which were not trained."
        if results.get("backbone_parameters")
        else f"* Base model: `{_plain(base.spec)}`.",
        f"* Fingerprint of its weights: `{base.fingerprint}`.",
        f"* Licence of the base model: {base.licence}.",
        f"* Trained parameters beside it: {results.get('trainable_parameters') or 0:,}.",
        f"* Method `{_named(recipe['method'])}`, pet `{_named(recipe['pet'])}`, head `{_named(recipe['head'])}`, "
        f"seed {results['seed']}.",
        f"* It answers with {len(classes)} classes." if classes else "* It answers with text.",
        "",
        "## Data\n",
        *_tasks(results),
        "",
        "## Measures\n",
        *_measures(results),
        "",
        "## Protection\n",
        *_certificate(results),
        "",
        "## How to load it\n",
        load or _load(to, base, bool(said and said[0].startswith("On "))),
        *said,
        "",
        "## The recipe\n",
        f"Without {', '.join(f'`{key}:`' for key in PRIVATE)}, which may name places on your computer.\n",
        f"```yaml\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip()}\n```\n",
    ]
    return "\n".join(parts)


def licence_of(backbone: Backbone) -> str:
    """The licence that the base model names, or `not known`. Nothing is fetched for it."""
    prefix, _, rest = backbone.spec.partition(":")
    if prefix == "perpetune" and rest in PACKAGED:
        return OF_PACKAGE
    known = getattr(backbone.net, "pretrained_cfg", None)
    if isinstance(known, Mapping) and isinstance(known.get("license"), str):
        return _plain(known["license"])
    return _licence_in(str(backbone.opens.get("base", "")).removeprefix("local-dir:"))


def _licence_in(place: str) -> str:
    """The licence that the card of a model names, in a folder or in the hub's cache; or `not known`."""
    readme: Path | None = Path(place) / CARD
    if place and readme is not None and not readme.is_file():
        readme = _cached(place)
    if not place or readme is None:
        return NOT_KNOWN
    try:
        _, head, _ = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
        given = yaml.safe_load(head)
    except (ValueError, OSError, yaml.YAMLError):
        return NOT_KNOWN
    named = given.get("license") if isinstance(given, dict) else None
    return _plain(named) if isinstance(named, str) else NOT_KNOWN


def _cached(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, CARD)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _base(base: Base) -> str | None:
    found = base.opens.get("base")
    return None if found is None or base.spec.startswith("perpetune:") else str(found)


def _tasks(results: Mapping[str, Any]) -> list[str]:
    lines = ["| task | classes | training examples | test examples | digest of the data |", "|---|---|---|---|---|"]
    for task in results["tasks"]:
        names = ", ".join(_plain(name) for name in task["classes"][:20]) or "texts"
        more = len(task["classes"]) - 20
        names += f" and {more} more" if more > 0 else ""
        digest = f"`{task['fingerprint']}`" if task.get("fingerprint") else NOT_KNOWN
        lines.append(f"| {_plain(task['name'])} | {names} | {task['train']:,} | {task['test']:,} | {digest} |")
    return [*lines, "", f"What was asked: the setting is `{results['setting']}`-incremental."]


def _measures(results: Mapping[str, Any]) -> list[str]:
    tasks, last = results["tasks"], results["cells"][-1] if results["cells"] else []
    measured = [(task["name"], cell) for task, cell in zip(tasks, last, strict=True) if cell]
    if not measured:
        return ["Nothing was measured: the tasks have no test data."]
    lines = ["After the last task:", "", "| task | accuracy | right | of |", "|---|---|---|---|"]
    for name, cell in measured:
        score = f" ({_plain(cell['score'])})" if cell.get("score") else ""
        lines.append(
            f"| {_plain(name)} | {cell['correct'] / cell['total']:.4f}{score} | {cell['correct']:g} | {cell['total']} |"
            if cell["total"]
            else f"| {_plain(name)} | none | 0 | 0 |"
        )
    metrics = results["metrics"]
    lines.append("")
    lines += [
        f"* {what}: {metrics[key]:.4f}"
        for key, what in (
            ("final_accuracy", "mean accuracy over the tasks"),
            ("average_accuracy", "the same, averaged over the time after each task"),
            ("forgetting", "forgetting (mean loss since each task was best)"),
        )
        if metrics.get(key) is not None
    ]
    return lines


def _certificate(results: Mapping[str, Any]) -> list[str]:
    entries = [entry for entry in results.get("protection", []) if entry.get("of") == "task"]
    if not entries:
        return ["The recipe has no `protect:` section, so old answers were not protected by construction."]
    last = entries[-1]
    moved = "Nothing was protected before."
    if last["worst"] is not None:
        moved = (
            f"The last task moved old outputs by {last['median']:.3g} (median over the sites) and {last['worst']:.3g} "
            "(worst site), as a share of their size."
        )
    return [
        f"Certificate after the last task: {moved} Room left: {last['room']:.1%}; "
        f"{len(last['full'])} of {len(last['sites'])} sites have none. Energy protected: {last['energy']:g}."
    ]


def _load(to: str, base: Base, whole: bool) -> str:
    if to == "peft":
        return f"{LOAD['peft']}\nWith a head of classes see `head.json`; docs/export.md of perpetune has the code."
    if to == "onnx":
        return LOAD["onnx"]
    call = "".join(f", {key}={value!r}" for key, value in base.opens.get("call", {}).items())
    if base.opens.get("library") == "timm":
        code = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
    elif base.takes == "pictures" and whole:
        code = (
            "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
            'model = AutoModelForImageClassification.from_pretrained("FOLDER")\n'
            'reader = AutoImageProcessor.from_pretrained("FOLDER")\n'
            f'scores = model(**reader(picture, return_tensors="pt"){call}).logits'
        )
    elif base.takes == "pictures":
        code = 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("FOLDER")'
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model, reader = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")'
        )
    return LOAD["merged"].format(code=code)


def _named(section: Any) -> str:
    """The name of a section of the recipe; sections with names of their own (`pets:`) as JSON."""
    if section is None:
        return "none"
    if isinstance(section, Mapping):
        return str(section["name"]) if "name" in section else json.dumps(section, default=str)
    return str(section)


def _plain(text: str) -> str:
    """A name from a user, on one line, that opens no cell of a table and no code."""
    return printable(text).replace("|", "\\|").replace("`", "'")
