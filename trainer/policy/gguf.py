"""GGUF weights as an ordinary model folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from trainer.policy.sources import ModelSource, cache_dir


def unpacked(source: ModelSource) -> Path:
    """A GGUF model as a Hugging Face folder in the cache. The first call unpacks it (20 s or more)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = Path(source.path) / str(source.gguf_file)
    stat = weights.stat()
    folder = cache_dir() / "unpacked" / f"{weights.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if not folder.exists():
        model: Any = AutoModelForCausalLM.from_pretrained(source.path, gguf_file=source.gguf_file, dtype=torch.float32)
        model.hf_quantizer, model.is_quantized = None, False  # the weights are plain float32, so they may be saved
        del model.config.quantization_config
        half = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        model.save_pretrained(half)
        AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file).save_pretrained(half)
        with contextlib.suppress(OSError):  # another process may have unpacked it first
            half.rename(folder)
        shutil.rmtree(half, ignore_errors=True)
    return folder
