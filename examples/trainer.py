"""Protection in Hugging Face's Trainer, with PEFT's LoRA on a tiny GPT-2: two more lines in a script."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import perpetune
from perpetune.integrations.transformers import ProtectionCallback


def task(number: int) -> list[dict[str, Tensor]]:
    """Texts of 12 tokens that count up in steps of 1 or 3, each task on 16 tokens of its own."""
    texts = [[16 * number + (start + step * i) % 16 for i in range(12)] for start in range(16) for step in (1, 3)]
    return [{"input_ids": torch.tensor(text), "labels": torch.tensor(text)} for text in texts]


def learn(protected: bool, steps: int) -> dict[str, float]:
    """Learn both tasks; how far the logits on the first have moved after the second, and the loss on either."""
    set_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=32, n_embd=64, n_layer=2, n_head=4, n_positions=16, initializer_range=0.1, **ends)
    lora = LoraConfig(r=32, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, lora_dropout=0.1)
    model = get_peft_model(GPT2LMHeadModel(config), lora)
    first = torch.stack([example["input_ids"] for example in task(0)])
    before = None
    protection = perpetune.protect(model, energy=0.95)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-2, report_to="none",
            use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        for number in (0, 1):
            trainer = Trainer(model, args, train_dataset=task(number))
            if protected:
                trainer.add_callback(ProtectionCallback(protection))
            trainer.train()
            before = model.eval()(first).logits.detach() if before is None else before
    print(protection if protected else "without protection")
    second = torch.stack([example["input_ids"] for example in task(1)])
    with torch.no_grad():
        after, learned = model.eval()(first, labels=first), model(second, labels=second)
    change = (after.logits - before).norm() / before.norm()
    return {"change": change.item(), "first": after.loss.item(), "second": learned.loss.item()}


def main(steps: int = 60) -> dict[str, dict[str, float]]:
    found = {name: learn(name == "protected", steps) for name in ("protected", "free")}
    print(*found.items(), sep="\n")
    return found


if __name__ == "__main__":
    main()
