"""Language models small enough to make in a test: real tokenizers, real weights, real files."""

from __future__ import annotations

from pathlib import Path

END = "<end>"


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_llama(
    directory: Path, text: str, *, steps: int = 0, architecture: str = "Llama", **shape: int
) -> Path:
    """Write a Hugging Face directory: a small decoder whose tokens are single bytes.

    Args:
        steps: optimizer steps that make it learn `text` by heart; 0 leaves its weights random.
        architecture: as transformers calls it, 'Qwen3' or another that takes a Llama's shape.
        shape: what of its configuration is to be otherwise.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,  # 256 bytes and the end: every other character is several tokens
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(directory)
    torch.manual_seed(0)
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 257,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "tie_word_embeddings": True,
        **shape,
    }
    config = getattr(transformers, f"{architecture}Config")(**values)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    torch.set_num_threads(1)
    ids = torch.tensor([[*tokenizer.encode(text).ids, config.eos_token_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


def save_adapter(directory: Path, base_dir: Path, *, seed: int = 1) -> Path:
    """Write a peft directory: a LoRA adapter with random matrices, and its base's tokenizer."""
    import shutil

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype="float32")
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(directory)
    for path in base_dir.glob("tokenizer*"):
        shutil.copyfile(path, directory / path.name)
    return directory
