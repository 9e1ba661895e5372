"""Merged exports: whole models that load without perpetune and answer as the state does; and the model card."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_export_used import asked, equal
from test_export_used import world as world
from tiny import recipe, tiny_language_model
from warm import Warm

from perpetune import Learner
from perpetune.check import Checker
from perpetune.cli import call
from perpetune.errors import PerpetuneError, UsageError
from perpetune.export import export_learned
from perpetune.export.checking import Agreement, compared, pictures_for
from perpetune.pets import folding, slots
from perpetune.recipe import make_recipe
from perpetune.seeding import own_global_state


def learned(world: Path, folder: Path, **changes: Any) -> Learner:
    made = Learner(recipe(world / "model", **changes), folder)
    made.learn(world / "m1")
    made.learn(world / "m2")
    return made


def pictures(world: Path) -> list[str]:
    return [str(world / name) for name in ("m1/犬/0.png", "m1/b/1.png", "m2/c/2.png", "m2/d/3.png")]


def pixels(made: Learner, world: Path) -> torch.Tensor:
    view: Any = made.method.model.view
    return torch.stack([view.load(path) for path in pictures(world)])


SSF = {"name": "ssf", "std": 0.1}


@pytest.mark.parametrize(
    ("head", "pet", "taps"),
    [
        ("linear", {"name": "lora", "rank": 2}, None),
        ("ridge", SSF, {"taps": 1, "tokens": "class"}),
        ({"name": "ncm", "metric": "euclidean"}, {"name": "lora", "rank": 2}, None),
    ],
    ids=["linear", "ridge", "ncm"],
)
def test_an_ordinary_classifier_of_transformers(head: Any, pet: Any, taps: Any, world: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    backbone = {"name": f"folder:{world / 'model'}", **(taps or {})}
    made = learned(world, tmp_path / "s", head=head, pet=pet, backbone=backbone)
    before = made.predict(pictures(world))
    made.export(tmp_path / "out", to="merged", images=world / "m1")
    assert made.predict(pictures(world)) == before  # the learner keeps its pets
    net = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(net).__name__ == "ViTForImageClassification"
    assert list(net.config.id2label.values()) == made.method.classes
    logits = net(pixel_values=made.backbone.normalised(pixels(made, world))).logits
    for row, ours in zip(logits.softmax(1), before, strict=True):
        assert dict(zip(made.method.classes, row.tolist(), strict=True)) == pytest.approx(dict(ours.classes), abs=1e-4)
    bare = torch.cat([p.flatten() for p in net.vit.state_dict().values()])
    base = torch.cat([p.flatten() for p in load_file(world / "model" / "model.safetensors").values()])
    assert not torch.equal(bare.sort().values, base.sort().values)  # the pets are in the weights
    equal(made, asked("transformers", tmp_path / "out", pictures(world)), pictures(world))  # the code of the page


def test_a_head_that_no_classifier_holds_lies_beside_the_model(world: Path, tmp_path: Path) -> None:
    made = learned(world, tmp_path / "s", head="cosine", backbone={"name": f"folder:{world / 'model'}", "taps": 2})
    made.export(tmp_path / "out", to="merged")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["ViTModel"]
    assert "`head.safetensors`" in (tmp_path / "out" / "README.md").read_text()
    equal(made, asked("transformers", tmp_path / "out", pictures(world)), pictures(world))


def dinov2(folder: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    with own_global_state("test", "dinov2"):
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("taps", [{}, {"taps": 1, "tokens": "both"}], ids=["class", "both"])
def test_a_classifier_that_also_reads_the_mean_of_the_patches(taps: Any, world: Path, tmp_path: Path) -> None:
    model = {"name": f"folder:{dinov2(tmp_path / 'dinov2')}", **taps}
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    made = learned(world, tmp_path / "s", head="ridge", backbone=model)
    made.export(tmp_path / "out", to="merged")
    assert "largest difference" in (tmp_path / "out" / "README.md").read_text()
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert kind == ["Dinov2ForImageClassification"]


@pytest.mark.parametrize(
    ("head", "backbone"),
    [
        ("linear", {"name": "test_vit"}),
        ("ridge", {"name": "test_vit", "image_size": 96, "taps": 1, "tokens": "class"}),
        ("cosine", {"name": "test_vit", "taps": 2}),
    ],
    ids=["linear", "another size", "beside"],
)
def test_a_checkpoint_of_timm(head: str, backbone: dict[str, Any], world: Path, tmp_path: Path) -> None:
    import timm

    model = {**backbone, "name": f"folder:{world / backbone['name']}"}
    made = learned(world, tmp_path / "s", head=head, backbone=model)
    before = made.predict(pictures(world))
    made.export(tmp_path / "out", to="merged")
    assert made.predict(pictures(world)) == before
    net: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    if head != "cosine":
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["label_names"] == made.method.classes
        logits = net(made.backbone.normalised(pixels(made, world)))
        for row, ours in zip(logits.softmax(1), before, strict=True):
            wanted = pytest.approx(dict(ours.classes), abs=1e-4)
            assert dict(zip(made.method.classes, row.tolist(), strict=True)) == wanted
    equal(made, asked("timm", tmp_path / "out", pictures(world)), pictures(world))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_is_a_folder_of_its_own(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_language_model(tmp_path / "lm", kind)
    rows = [{"prompt": f"sky {n} is", "answer": "blue", "options": ["blue", "red"]} for n in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tuned = {"pet": {"name": "lora", "at": ["q", "v"]}, "train": {"epochs": 2, "batch_size": 6, "lr": 0.05}}
    model = {"name": "t", "backbone": f"hf:{tmp_path / 'lm'}", "head": "lm", "run": {"device": "cpu"}, **tuned}
    made = Learner({**model, "method": "finetune"}, tmp_path / "s")
    made.learn(tmp_path / "d.jsonl")
    made.export(tmp_path / "out", to="merged")
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([reader("sky 7 is")["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")(input_ids=ids).logits
    with made.method.acting("default"):
        ours = made.backbone.net(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert (theirs - bare).abs().max() > 1e-2
    with pytest.raises(UsageError, match=r"--images is for pictures"):
        made.export(tmp_path / "again", to="merged", images=tmp_path)


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "treelora", "answer": "routed"}}, "TreeLoRA answers with one of 4 sets.*use --to peft"),
        ({"method": "safe", "head": "ridge"}, "Safe answers with more than one set of pets.*`--to onnx`"),
        ({"method": {"name": "pool", "select": "gaussian"}, "head": "ridge"}, "Pool answers with one of"),
        ({"average": {"keep": 0.5, "answer": "both"}}, "average.answer: both answers with the average"),
        ({"method": {"name": "first_session", "concat": True}, "head": "ncm"}, "frozen model beside.*use --to peft"),
        ({"pet": {"name": "adapter"}}, "Adapter cannot be folded into .*: use --to onnx"),
    ],
    ids=["treelora", "safe", "pool", "average", "beside", "adapter"],
)
def test_what_cannot_be_merged_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    lora = {"name": "lora", "rank": 2}
    checker = Checker(make_recipe({"pet": lora, "train": {"epochs": 1, "batch_size": 8}, **changes}))
    method = checker.learned()
    checker.backbone.opens = {"library": "transformers", "base": "x", "options": {}}
    places = [path for path, _ in slots(checker.backbone.net)]
    with pytest.raises(UsageError, match=message) as found:
        export_learned(method, checker.backbone, tmp_path / "out", to="merged")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()
    assert [path for path, _ in slots(checker.backbone.net)] == places


def test_an_export_that_answers_otherwise_is_not_kept(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = learned(world, tmp_path / "s", head="linear")

    def turned(weight: Any, layout: Any, width: int) -> Any:
        return 1.5 * weight[0], weight[1]

    monkeypatch.setattr("perpetune.export.merged._rows", turned)
    with pytest.raises(PerpetuneError, match=r"does not answer as the state does, so it is not kept. On 12 pictures"):
        made.export(tmp_path / "out", to="merged", images=world / "m1")
    assert not (tmp_path / "out").exists()


def test_the_check_sees_other_scores_other_classes_and_what_all_share() -> None:
    class Method:
        def predict(self, inputs: Any) -> torch.Tensor:
            return inputs.pixels.flatten(1).float()

    method: Any = Method()
    some = torch.randint(0, 200, (50, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    own = some.flatten(1).float()
    rows = {tuple(p.flatten().tolist()): r for p, r in zip(some, own, strict=True)}

    def theirs(change: Any) -> Any:
        return lambda batch: torch.stack([change(rows[tuple(p.flatten().tolist())].clone()) for p in batch])

    assert compared(method, some, theirs(lambda row: row)) == Agreement(50, 0.0, 0)
    assert not compared(method, some, theirs(lambda row: row + 1)).holds
    assert compared(method, some, theirs(lambda row: row + 1), shift=True).holds
    assert compared(method, some, theirs(lambda row: row.flip(0))).others > 20
    assert compared(method, some, theirs(lambda row: row.fill_(torch.nan))).difference == float("inf")


def test_folding_ends_as_it_began(tmp_path: Path) -> None:
    checker = Checker(make_recipe({"pet": {"name": "lora", "rank": 2}, "train": {"epochs": 1, "batch_size": 8}}))
    checker.learned()
    net, before = checker.backbone.net, dict(slots(checker.backbone.net))

    def broken() -> None:
        with folding(net, "default"):
            assert not list(slots(net))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert dict(slots(net)) == before


# -- the command, and the card ------------------------------------------------------------------------------


def test_the_command_and_its_card(world: Path, tmp_path: Path, warm: Warm) -> None:
    (world / "model" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# a model\n")
    protect = {"protect": {}, "pet": {"name": "lora", "rank": 2}, "head": "ridge"}
    made = learned(world, tmp_path / "s", **protect)
    shown = [*warm.command, "-m", "perpetune", "export", str(tmp_path / "s"), str(tmp_path / "out")]
    done = subprocess.run(
        [*shown, "--to", "merged", "--images", str(world / "m2")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'out'}: README.md, config.json, head.json, head.safetensors, model.saf")
    card = (tmp_path / "out" / "README.md").read_text()
    top = yaml.safe_load(card.split("---\n")[1])
    assert (top["license"], top["library_name"]) == ("cc-by-4.0", "transformers")
    tasks = [one.task() for one in made.state.committed]
    assert all(task["fingerprint"] in card for task in tasks)
    assert "perpetune 0" in card
    assert "| m1 | b, 犬 | " in card
    assert "Certificate after the last task: The last task moved old outputs by" in card
    assert "On 12 pictures the largest difference" in card
    assert "AutoModelForImageClassification" in card
    assert str(world) not in card.split("## The recipe")[1].split("backbone:")[0]


def test_bad_input_of_the_command_is_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learned(world, tmp_path / "s", head="linear")
    for more, message in (
        (["--to", "tflite"], "--to tflite: one of peft, merged, onnx"),
        (["--images", str(world / "m1")], "--images checks merged weights and graphs"),
        (["--to", "merged", "--images", str(tmp_path / "none")], "none"),
    ):
        assert call(["export", str(tmp_path / "s"), str(tmp_path / "out"), *more]) == 2
        said = capsys.readouterr().err.strip()
        assert message in said
        assert "\n" not in said
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pet", ["lora", "ssf"])
def test_five_hundred_digits_with_the_packaged_model(pet: str, tmp_path: Path) -> None:
    content = {"name": "digits", "backbone": "perpetune:micro", "pet": pet, "head": "ridge", "method": "first_session"}
    stream = {"stream": {"classes_per_task": 5}, "data": "digits", "train": {"epochs": 1}, "run": {"device": "cpu"}}
    made = Learner({**content, **stream}, tmp_path / "s")
    made.run()
    made.export(tmp_path / "out", to="merged")
    card = (tmp_path / "out" / "README.md").read_text()
    print(card[card.index("On 500") :].splitlines()[0])
    assert "On 500 pictures the largest difference" in card
    view: Any = made.method.model.view
    assert pictures_for(view, None).shape == (500, 3, 32, 32)
