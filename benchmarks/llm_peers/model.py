"""A language model made on the spot: a Llama of a given shape with random weights, as real files.

Tokens are pairs of printable characters, so that each of them is text by itself; the end of
sequence and bytes beyond ASCII are never the likeliest, so that greedy answers have full length.

    save_model(Path("model"), FULL)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_TOKENS = 1024
VOCAB_SIZE = 8192
FIRST_PAIR = 257
"""Of the token ids from here on any may be in a prompt."""
_END = "<end>"


@dataclass(frozen=True)
class Shape:
    """Of a decoder."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    @property
    def num_weights(self) -> int:
        """Those that a decode step reads: the embeddings are tied."""
        head_size = self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size * head_size
        attention *= self.num_attention_heads + self.num_key_value_heads
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * layer + VOCAB_SIZE * self.hidden_size


FULL = Shape(768, 12, 12, 4, 2048)
"""82 million weights."""
QUICK = Shape(128, 2, 4, 2, 256)
"""To see that everything runs."""


def save_model(directory: Path, shape: Shape) -> Path:
    """Write a Hugging Face directory, its weights in bf16."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [chr(code) for code in range(33, 127)]
    merges = list(itertools.product(printable, repeat=2))[: VOCAB_SIZE - FIRST_PAIR]
    tokens = [_END, *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        **vars(shape),
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.get_output_embeddings().weight.data[:FIRST_PAIR] = 0
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory
