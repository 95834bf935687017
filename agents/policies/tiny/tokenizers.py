"""Tokenizers of the published classes, trained on a few sentences: no download, and real words make few tokens."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SENTENCES = (
    "a photo of a red circle left of a blue square",
    "two green triangles above one yellow star, three purple dogs and four orange cats",
    "make the red circle blue, remove the square and add a black bench next to the white clock",
    "move the bird to the right of the tree below the house and replace the apple with an empty cup",
    "blurry, low quality, distorted, deformed, broken content, noise",
)
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_PAD, _STOP, _UNKNOWN = "<pad>", "</s>", "<unk>"
_PRINTABLE = [chr(code) for code in range(33, 127)]


def clip_tokenizer(max_length: int = 77, vocab_size: int = 800) -> Any:
    """CLIP's tokenizer: byte-pair encoding that any text has tokens in.

    Args:
        max_length: tokens of a text, both ends included.
        vocab_size: at most; the 512 bytes (within and at the end of a word) and the two ends are always there.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(letters) - 2,
        initial_alphabet=letters,
        end_of_word_suffix=_END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    # Texts that end a word where no sentence above does need these.
    pieces += [f"{letter}{_END_OF_WORD}" for letter in letters]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, _BEGIN, _END]))}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)


def t5_tokenizer(max_length: int = 512, vocab_size: int = 400) -> Any:
    """T5's tokenizer: a unigram model over pieces of words; 0 pads, 1 ends a text, 2 is unknown.

    Args:
        max_length: tokens of a text, its end included.
        vocab_size: at most.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    # An alias that the package makes as it is imported, unseen by type checkers.
    t5_class: Any = getattr(transformers, "T5TokenizerFast")  # noqa: B009
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _STOP, _UNKNOWN],
        unk_token=_UNKNOWN,
        initial_alphabet=_PRINTABLE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_STOP}", special_tokens=[(_STOP, 1)])
    with TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": max_length}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        return t5_class.from_pretrained(folder)
