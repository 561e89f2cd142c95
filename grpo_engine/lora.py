"""Low-rank adapters: W + (alpha / r) B A is trained through B [out, r] and A [r, in], W is frozen.

peft puts the adapters into the linear layers of the model, in place (Hu et al., arXiv 2106.09685).
The model stays the Hugging Face class it was, so packed rows, sampling, gradient checkpointing and
the LM head know nothing of them. A frozen copy of a policy, such as the reference of the KL term,
is one more adapter in the same layers instead of a second model; while its B is zero it is the base
itself, and is switched off rather than computed.

Weights are merged only on their way into a file: a trained model merged and unmerged in place would
collect the rounding of each turn.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grpo_engine.types import UserError

ADAPTER_FOLDER = "adapter"  # in a checkpoint, beside the merged model
TRAINED = "default"  # the adapter that is active unless another is asked for; peft's own first name
_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's files name parameters from its wrapper, which we do not use


@dataclass(frozen=True)
class LoraOptions:
    """What to train. Raises UserError without peft.

    Args:
        alpha: B A counts alpha / r; None = 2 r, as in TRL.
        target_modules: "all-linear" (every linear layer but the LM head), or ends of layer names,
            such as ["q_proj", "mlp.up_proj"].
        seed: of the random A; B starts at zero.
    """

    r: int
    alpha: int | None = None
    target_modules: str | Sequence[str] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise UserError(f"lora_r={self.r}: needs peft (pip install grpo-engine[lora])")


class Adapter:
    """One of the adapters in the layers of ``model``: the trained one, or a frozen copy of it."""

    def __init__(self, model: PreTrainedModel, name: str, config: Any, seed: int = 0) -> None:
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.model, self.name, self.config = model, name, config
        # peft draws A on the host, wherever the model is.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the second adapter
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(config, model, name)
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        for parameter in self.parameters().values():  # bf16 would lose small updates
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(dtype)
        for layer in self.layers.values():
            layer.set_adapter(TRAINED)
        self.weights_changed()

    @classmethod
    def attach(cls, model: PreTrainedModel, options: LoraOptions) -> Adapter:
        """Give ``model`` its trained adapter. Raises UserError for a layer that cannot have one."""
        from peft import LoraConfig

        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.name_or_path,
            r=options.r,
            lora_alpha=2 * options.r if options.alpha is None else options.alpha,
            target_modules=_checked_targets(model, options.target_modules),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        )
        return cls(model, TRAINED, config, options.seed)

    @torch.no_grad()
    def frozen_copy(self) -> Adapter:
        """Another adapter with these weights, which takes no gradient."""
        number = len(next(iter(self.layers.values())).lora_A)
        frozen = Adapter(self.model, f"frozen{number}", copy.deepcopy(self.config))
        for ours, theirs in zip(
            frozen.parameters().values(), self.parameters().values(), strict=True
        ):
            ours.copy_(theirs)
        frozen.weights_changed()
        return frozen

    def parameters(self) -> dict[str, nn.Parameter]:
        """The live parameters. All adapters of a model use the same names."""
        return {
            f"{path}.{part}.weight": getattr(layer, part)[self.name].weight
            for path, layer in self.layers.items()
            for part in ("lora_A", "lora_B")
        }

    def weights_changed(self) -> None:
        """To be called when a frozen adapter has been given other weights."""
        ups = (layer.lora_B[self.name].weight for layer in self.layers.values())
        self.is_base = self.name != TRAINED and not any(bool(up.any()) for up in ups)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Forwards of the model in this context use this adapter; a frozen one without gradient."""
        if self.name == TRAINED:
            yield
            return
        layers = self.layers.values()
        try:
            for layer in layers:
                if self.is_base:
                    layer.enable_adapters(False)
                else:
                    layer.set_adapter(self.name)
            with torch.no_grad():
                yield
        finally:
            for layer in layers:
                if self.is_base:
                    layer.enable_adapters(True)
                else:
                    layer.set_adapter(TRAINED)

    @torch.no_grad()
    def merged_state_dict(self) -> dict[str, Tensor]:
        """The weights of an ordinary model of the same class. Merged layers are copies on the host,
        added up in fp32 and kept in the model's dtype; the rest are the live tensors."""
        merged = dict(base_tensors(self.model.state_dict().items()))
        for path, layer in self.layers.items():
            weight = layer.get_base_layer().weight
            total = weight + layer.get_delta_weight(self.name)  # fp32: the adapter's dtype is wider
            merged[f"{path}.weight"] = total.to(weight.dtype).cpu()
        return merged

    def file_tensors(self) -> dict[str, Tensor]:
        """The live tensors, under their names in peft's files."""
        return {_PREFIX + name: p.detach() for name, p in self.parameters().items()}

    def save(self, folder: Path) -> None:
        """Write the two files that ``PeftModel.from_pretrained(base, folder)`` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.cpu().contiguous() for name, p in self.file_tensors().items()}
        save_file(tensors, folder / _FILE, metadata={"format": "pt"})
        self.config.save_pretrained(folder)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The weights that ``Adapter.save`` wrote, under the names of ``Adapter.parameters``."""
    return {n.removeprefix(_PREFIX): tensor for n, tensor in load_file(folder / _FILE).items()}


def base_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Without the adapters, under the names that the model had before it was given any."""
    for name, tensor in named:
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def _checked_targets(model: PreTrainedModel, wanted: str | Sequence[str]) -> str | list[str]:
    """Each name must be of a layer that takes an adapter. peft is content if one of them is, and
    would adapt the head too, which the fused loss reads as it is."""
    if wanted == "all-linear":
        return wanted
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    head = model.get_output_embeddings()
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    for name in names or [""]:
        if not any(f".{path}".endswith(f".{name}") and name for path in paths):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            raise UserError(
                f"lora_target_modules: {name!r} is no layer of {type(model).__name__} that takes "
                f"an adapter; those are {known}"
            )
    return names
