"""Protection in TRL's SFTTrainer, on a tiny Llama: the callback of transformers' Trainer, added in the same way."""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import perpetune
from perpetune.integrations.transformers import ProtectionCallback


def task(number: int) -> Dataset:
    """Texts of 12 words that go on in steps of 1 or 3, each task with 16 words of its own."""
    texts = [[16 * number + (start + step * i) % 16 for i in range(12)] for start in range(16) for step in (1, 3)]
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in text) for text in texts]})


def learn(protected: bool, steps: int) -> dict[str, float]:
    """Learn both tasks; how far the logits on the first have moved after the second, and the loss on either."""
    set_seed(0)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)} | {"<end>": 32}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=33, initializer_range=0.1, bos_token_id=32, eos_token_id=32, **size)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=32, target_modules="all-linear"))
    protection = perpetune.protect(model, energy=0.95)
    texts = [tokenizer(task(n)["text"][:], return_tensors="pt")["input_ids"] for n in (0, 1)]
    before = None
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-2, report_to="none", bf16=False,
            use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        for number in (0, 1):
            trainer = SFTTrainer(model, args, train_dataset=task(number), processing_class=tokenizer)
            if protected:
                trainer.add_callback(ProtectionCallback(protection))
            trainer.train()
            before = model.eval()(texts[0]).logits.detach() if before is None else before
    print(protection if protected else "without protection")
    with torch.no_grad():
        first, second = (model.eval()(text, labels=text) for text in texts)
    change = (first.logits - before).norm() / before.norm()
    return {"change": change.item(), "first": first.loss.item(), "second": second.loss.item()}


def main(steps: int = 60) -> dict[str, dict[str, float]]:
    found = {name: learn(name == "protected", steps) for name in ("protected", "free")}
    print(*found.items(), sep="\n")
    return found


if __name__ == "__main__":
    main()
