"""A tokenizer for the tiny models: one token for each character, with a chat template."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCAB_SIZE

__all__ = ["CHAT_TEMPLATE", "save_tiny_tokenizer"]

# The tiny models end at token 2 and pad with token 0.
_SPECIAL = ("<pad>", "<s>", "<|end|>", "<unk>", "<|user|>", "<|assistant|>")
_CHARACTERS = "\n" + string.digits + string.ascii_letters + string.punctuation + " "

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_tokenizer(folder: Path, *, has_chat_template: bool = True) -> PreTrainedTokenizerFast:
    """Write the tokenizer beside a tiny model, and return it."""
    tokens = [*_SPECIAL, *_CHARACTERS]
    # Greek letters for the ids that are left: a random model may say any of them.
    tokens += [chr(0x391 + index) for index in range(VOCAB_SIZE - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    if has_chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer
