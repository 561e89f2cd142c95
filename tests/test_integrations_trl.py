"""Our GRPOTrainer against TRL's own: loss, gradients of every parameter and metrics, over TRL's
options, through the real fused head of a real model."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from tiny_model import make_tiny_model
from trl_training import compare_curves, train

from grpo_engine.kernels.common import interpreting
from grpo_engine.kernels.loss_options import LOSS_TYPES

pytest.importorskip("trl", minversion="1.16.0")
pytestmark = pytest.mark.skipif(interpreting(), reason="compares the portable path")

PROMPT, LENGTHS, WIDTH, VOCAB = 4, (7, 3, 12, 0, 1, 9), 12, 40
TRL_LOSSES = sorted(set(LOSS_TYPES) - {"gspo"})
KEEPS = (  # fields of GRPOConfig that the loss reads from the trainer itself
    "beta",
    "loss_type",
    "importance_sampling_level",
    "top_entropy_quantile",
    "off_policy_mask_threshold",
    "entropy_coef",
    "use_adaptive_entropy",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def make_model(folder, temperature: float = 0.8):
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(folder)
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    return model.train()


@pytest.fixture(scope="module")
def model(folder):
    return make_model(folder)


def trainer_classes() -> tuple[type, type]:
    from trl import GRPOTrainer as Theirs

    from grpo_engine.integrations.trl import GRPOTrainer as Ours

    return Theirs, Ours


def batch(model, seed: int = 0) -> dict[str, torch.Tensor]:
    """TRL's inputs: left-padded prompts, right-padded completions, a tool's token, an empty row."""
    g = torch.Generator().manual_seed(seed)
    rows = len(LENGTHS)
    prompt_mask = torch.ones(rows, PROMPT, dtype=torch.long)
    prompt_mask[1, :2] = 0
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    tool_mask = torch.ones(rows, WIDTH, dtype=torch.long)
    tool_mask[2, 4] = 0
    ids = torch.randint(3, VOCAB, (rows, PROMPT + WIDTH), generator=g)
    attention = torch.cat([prompt_mask, mask], 1)
    ids = ids * attention
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :PROMPT] = -100
    with torch.no_grad():
        now = model(ids, attention_mask=attention, labels=labels, fused_lm_head=True).log_probs
    now = now[:, -WIDTH:]

    def near(spread: float) -> torch.Tensor:
        return now + spread * torch.randn(now.shape, generator=g)

    old = near(0.3)
    return {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask,
        "tool_mask": tool_mask,
        "advantages": torch.randn(rows, generator=g),
        "old_per_token_logps": old,
        "ref_per_token_logps": near(0.3),
        "sampling_per_token_logps": old + 0.1 * torch.randn(now.shape, generator=g),
        "num_items_in_batch": (mask * tool_mask).sum(),
    }


def stand_in(kind: type, model, mode: str, accumulation: int, changed: dict):
    """A trainer of class ``kind`` without its __init__: what the loss reads, at TRL's defaults."""
    from trl import GRPOConfig

    fields = GRPOConfig.__dataclass_fields__
    unknown = set(changed) - set(fields)
    assert not unknown, f"no options of TRL: {unknown}"
    args = SimpleNamespace(**{name: field.default for name, field in fields.items()} | changed)
    args.steps_per_generation, args.torch_compile = accumulation, False
    args.report_to = []
    trainer = object.__new__(kind)
    trainer.args, trainer.model = args, model.train(mode == "train")
    trainer.accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        is_main_process=False,
        autocast=torch.no_grad if mode == "eval" else torch.enable_grad,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        pad_across_processes=lambda x, **_: x,
        reduce=lambda x, reduction: x,
    )
    for name in KEEPS:
        setattr(trainer, name, getattr(args, name))
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.max_completion_length = WIDTH + 3
    trainer.current_gradient_accumulation_steps = accumulation
    trainer._entropy_bonus_enabled = trainer.entropy_coef != 0 or trainer.use_adaptive_entropy
    trainer._entropy_window_stats, trainer._last_world_entropy = None, 1.0
    trainer.aux_loss_enabled = hasattr(model.config, "output_router_logits")
    trainer.router_aux_loss_coef = 0.1
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = False
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return trainer


def outcome(kind: type, model, inputs: dict, mode, accumulation, ratio, calls, changed) -> dict:
    trainer = stand_in(kind, model, mode, accumulation, changed)
    if ratio is not None:
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        inputs = inputs | {"importance_sampling_ratio": ratio}
    model.zero_grad()
    losses = []
    for _ in range(calls):
        loss = trainer._compute_loss(model, inputs)
        if mode == "train":
            loss.backward()
        losses.append(loss.item())
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if mode == "train"}
    return {
        "losses": losses,
        "grads": grads,
        "metrics": dict(trainer._metrics[mode]),
        "coef": trainer.entropy_coef,
    }


def compare(model, *, inputs=None, mode="train", accumulation=1, ratio=None, calls=1, **changed):
    """Both trainers on the same inputs: the same loss, gradients and metrics."""
    inputs = batch(model) if inputs is None else inputs
    case = (model, inputs, mode, accumulation, ratio, calls, changed)
    theirs, ours = (outcome(kind, *case) for kind in trainer_classes())
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-5, abs=2e-6)
    for name, expected in theirs["grads"].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            ours["grads"][name], expected, rtol=1e-4, atol=1e-5 * scale + 1e-8, msg=name
        )
    assert ours["coef"] == theirs["coef"]
    assert set(ours["metrics"]) == set(theirs["metrics"])
    for name, values in theirs["metrics"].items():
        found = ours["metrics"][name]
        assert found == pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True), name
    return theirs


# vespo with sequence ratios is the same as with token ratios: TRL only warns
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_every_loss_type(model, loss_type: str, level: str, beta: float):
    if loss_type == "vespo" and level == "sequence" and beta:
        pytest.skip("refused, see test_what_is_refused")
    found = compare(
        model,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon=0.1,
        epsilon_high=1.1 if loss_type == "cispo" else 0.15,
        accumulation=2,
    )
    assert max(grad.abs().max() for grad in found["grads"].values()) > 1e-4


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_on_policy_and_evaluation(model, loss_type: str):
    inputs = batch(model)
    del inputs["old_per_token_logps"], inputs["tool_mask"]
    compare(model, inputs=inputs, loss_type=loss_type, epsilon_high=1.2, accumulation=3)
    compare(model, mode="eval", loss_type=loss_type, epsilon_high=1.2, accumulation=3)


OPTIONS = {
    "kl without correction": {"beta": 0.3, "use_bias_correction_kl": False},
    "r1": {"epsilon": 10.0, "beta": 0.001},
    "high-entropy tokens": {"top_entropy_quantile": 0.4},
    "off-policy sequences": {"off_policy_mask_threshold": 0.02},
    "entropy bonus": {"entropy_coef": 0.02},
    "both masks, kl and bonus": {
        "top_entropy_quantile": 0.5,
        "off_policy_mask_threshold": 0.02,
        "entropy_coef": 0.02,
        "beta": 0.1,
    },
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_options(model, loss_type: str, level: str, case: str):
    options = {"epsilon_high": 1.2 if loss_type == "cispo" else None, **OPTIONS[case]}
    if loss_type == "vespo" and level == "sequence" and options.get("beta"):
        options["use_bias_correction_kl"] = False
    compare(model, loss_type=loss_type, importance_sampling_level=level, **options)


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_two_sided_clip_and_soft_gates(model, loss_type: str):
    """TRL does not look at delta where nothing is clipped."""
    compare(model, loss_type=loss_type, delta=1.25, epsilon=0.2, epsilon_high=0.2)
    gates = {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0}
    weights = {"vespo_k_pos": 0.5, "vespo_lambda_pos": 0.2, "vespo_k_neg": 1.5}
    compare(model, loss_type=loss_type, epsilon_high=1.2, **gates, **weights)


@pytest.mark.parametrize("shape", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_sampler_correction(model, loss_type: str, shape: str):
    """The ratio as TRL hands it over: bounded, 0 where it masks, 1 on padding."""
    if loss_type == "vespo" and shape == "sequence":
        pytest.skip("TRL refuses it")
    inputs = batch(model)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    ratio = (0.5 * torch.randn(mask.shape) * mask).exp()
    ratio[0, 1] = 0.0
    if shape == "sequence":
        ratio = ratio.prod(1, keepdim=True).clamp(max=3.0)
    for level in ("token",) if loss_type == "vespo" else ("token", "sequence"):
        compare(
            model,
            inputs=inputs,
            ratio=ratio,
            loss_type=loss_type,
            importance_sampling_level=level,
            beta=0.1,
            epsilon_high=1.2,
        )


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_advantages_per_token(model, loss_type: str):
    inputs = batch(model)
    inputs["advantages"] = torch.randn(len(LENGTHS), WIDTH)
    compare(model, inputs=inputs, loss_type=loss_type, epsilon_high=1.2)


@pytest.mark.parametrize("target", [0.5, 5.0])
def test_adaptive_entropy_controller(model, target: float):
    compare(
        model,
        calls=3,
        use_adaptive_entropy=True,
        entropy_target=target,
        entropy_coef=0.01,
        entropy_coef_delta=0.005,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_rows_as_triton_devices_get_them(model, monkeypatch, loss_type: str, level: str):
    """There TRL passes the scored tokens alone, without the padding around them."""
    import trl.trainer.utils as utils

    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    options = {"importance_sampling_level": level, "epsilon_high": 1.2}
    compare(model, loss_type=loss_type, **options)
    if loss_type == "dapo":
        compare(model, loss_type=loss_type, beta=0.1, entropy_coef=0.01, **options)


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_a_batch_without_tokens_has_a_zero_gradient(model, loss_type: str):
    inputs = batch(model)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    inputs["num_items_in_batch"] = torch.tensor(0)
    for coef in (0.0, 0.1):  # in one pass, in two
        options = {"loss_type": loss_type, "epsilon_high": 1.2, "beta": 0.1, "entropy_coef": coef}
        assert compare(model, inputs=inputs, **options)["losses"] == [0.0]


def test_what_is_refused(model):
    from grpo_engine.integrations.contract import Unsupported
    from grpo_engine.integrations.trl_head import LogProbFunction

    _, ours = trainer_classes()

    def run(**changed):
        return ours._compute_loss(stand_in(ours, model, "train", 1, changed), model, batch(model))

    with pytest.raises(ValueError, match="delta must be >= 1 \\+ epsilon_high"):
        run(delta=1.05, epsilon=0.2)
    with pytest.raises(ValueError, match="loss_type must be one of"):
        run(loss_type="gmpo")
    with pytest.raises(Unsupported, match="importance_sampling_level='sequence'.*vespo"):
        run(loss_type="vespo", importance_sampling_level="sequence", beta=0.1)
    weight = torch.nn.Parameter(torch.randn(VOCAB, 8))
    weight.ds_id = 0
    with pytest.raises(Unsupported, match="ZeRO-3"):
        LogProbFunction.apply(
            torch.randn(3, 8), weight, None, torch.zeros(3).long(), 1.0, 64, None, 1.0, ("entropy",)
        )


# ---- The op alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")])
def test_log_prob_op(softcap, bias: bool, outputs):
    """No further from the truth in fp64 than twice TRL's own."""
    from trl.kernels import ChunkedLogProbFunction

    from grpo_engine.integrations.trl_head import LogProbFunction
    from grpo_engine.kernels import linear_logprobs_ref

    head = (torch.randn(33, 16), torch.randn(VOCAB, 16), torch.randn(VOCAB) if bias else None)
    ids, upstream = torch.randint(0, VOCAB, (33,)), torch.randn(2, 33)

    def truth(hidden, weight, bias, ids, temperature, _, softcap, scale, outputs):
        options = {"bias": bias, "temperature": temperature, "logit_softcap": softcap}
        found = linear_logprobs_ref(
            *(hidden, weight, ids), **options, logit_scale=scale, return_entropy=True
        )
        return (found if "entropy" in outputs else (found[0], None)) + (None,) * 3

    results = []
    for op, dtype in (
        (truth, torch.float64),
        (ChunkedLogProbFunction.apply, torch.float32),
        (LogProbFunction.apply, torch.float32),
    ):
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in head]
        found = op(*leaves, ids, 0.7, 16, softcap, 1.3, outputs)
        given = [x for x in found if x is not None]
        assert len(found) == 5 and len(given) == len(outputs)
        total = sum((x * g).sum() for x, g in zip(given, upstream, strict=False))
        results.append([*given, *torch.autograd.grad(total, [x for x in leaves if x is not None])])
    for exact, theirs, ours in zip(*results, strict=True):
        error, allowed = ((x - exact).abs().max().item() for x in (ours, theirs))
        assert error <= 2 * allowed + 1e-6


def test_autocast_multiplies_in_the_autocast_dtype():
    from trl.kernels import ChunkedLogProbFunction

    from grpo_engine.integrations.trl_head import LogProbFunction

    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(VOCAB, 16)
    rest = (None, torch.randint(0, VOCAB, (9,)), 1.0, 64, None, 1.0, ("entropy",))
    exact = LogProbFunction.apply(hidden, weight, *rest)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours = LogProbFunction.apply(hidden, weight, *rest)[0]
        theirs = ChunkedLogProbFunction.apply(hidden, weight, *rest)[0]
    assert not torch.equal(ours, exact)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)  # theirs rounds its logits
    (grad,) = torch.autograd.grad(ours.sum(), hidden)
    assert grad.dtype == torch.float32


def test_statistics_that_we_do_not_make_are_trls_own():
    from trl.kernels import ChunkedLogProbFunction

    from grpo_engine.integrations.trl_head import LogProbFunction

    arguments = (torch.randn(5, 8), torch.randn(VOCAB, 8), None, torch.arange(5), 1.0, 16)
    arguments += (None, 1.0, ("entropy", "is_top1"))
    with pytest.warns(UserWarning, match="is_top1"):
        ours = LogProbFunction.apply(*arguments)
    theirs = ChunkedLogProbFunction.apply(*arguments)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None) and (mine is None or torch.equal(mine, other))


# ---- Patch, and a training -----------------------------------------------------------------------


def test_unpatch_restores_what_was_there():
    import trl.trainer.utils as utils
    from trl import GRPOTrainer

    from grpo_engine.integrations.trl import patch_trl, unpatch_trl
    from grpo_engine.integrations.trl_head import LogProbFunction

    op, loss = utils._ChunkedLogProbFunction, GRPOTrainer.__dict__["_compute_loss"]
    patch_trl(loss=False)
    assert utils._ChunkedLogProbFunction is LogProbFunction
    assert GRPOTrainer.__dict__["_compute_loss"] is loss
    patch_trl()
    patch_trl()
    assert GRPOTrainer.__dict__["_compute_loss"] is not loss
    unpatch_trl()
    unpatch_trl()
    assert utils._ChunkedLogProbFunction is op
    assert GRPOTrainer.__dict__["_compute_loss"] is loss


def test_twenty_steps_give_the_same_curve(folder, tmp_path):
    """Subclass, patch and TRL alone: the same rewards, losses and metrics at every step."""
    from grpo_engine.integrations.trl import patch_trl, unpatch_trl

    theirs, ours = trainer_classes()
    expected = train(theirs, folder, tmp_path / "trl", max_steps=20)
    runs = [train(ours, folder, tmp_path / "ours", max_steps=20)]
    patch_trl()
    try:
        runs.append(train(theirs, folder, tmp_path / "patched", max_steps=20))
    finally:
        unpatch_trl()
    rewards = [row["reward"] for row in expected if "reward" in row]
    assert len(expected) == 20 and sum(rewards[-3:]) > 1.5 * sum(rewards[:3])
    for rows in runs:
        compare_curves(rows, expected)


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
SOFT_PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
CONDITIONS = {
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"LoraConfig": LORA},
    "lora, checkpointing": {"LoraConfig": LORA, "gradient_checkpointing": True},
    "soft prompt": {"PromptTuningConfig": SOFT_PROMPT, "beta": 0.0},
    "fp32 head": {"cast_lm_head_to_fp32": True, "temperature": 0.7},
    "rollouts for two updates": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "truncated masked": {"mask_truncated_completions": True, "loss_type": "grpo"},
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_training_under_other_conditions(folder, tmp_path, name: str):
    options, runs = {"max_steps": 4} | CONDITIONS[name], []
    adapter = next((key for key in options if key.endswith("Config")), None)
    settings = options.pop(adapter, None)
    for kind in trainer_classes():
        peft = pytest.importorskip("peft") if adapter else None
        config = getattr(peft, adapter)(**settings) if adapter else None
        runs.append(train(kind, folder, tmp_path, peft_config=config, **options))
    compare_curves(runs[1], runs[0])


def test_a_training_in_bf16(folder, tmp_path):
    """Two steps on the same rollouts. TRL rounds the logits to bf16, ours does not, which may carry
    a token over a bound of the clip; so the shares of clipped tokens are left out."""
    options = {"bf16": True, "max_steps": 2}
    theirs, ours = (train(kind, folder, tmp_path, **options) for kind in trainer_classes())
    names = ("loss", "grad_norm", "entropy", "kl")
    first, second = ([{name: row[name] for name in names} for row in x] for x in (ours, theirs))
    compare_curves(first, second, rel=0.03)


def test_rloo_under_the_patch(folder, tmp_path):
    """Its own loss, on our log-prob op."""
    import trl.trainer.utils as utils
    from trl import RLOOTrainer

    from grpo_engine.integrations.trl import patch_trl, unpatch_trl
    from grpo_engine.integrations.trl_head import LogProbFunction

    expected = train(RLOOTrainer, folder, tmp_path, max_steps=4)
    patch_trl()
    try:
        assert utils._ChunkedLogProbFunction is LogProbFunction
        found = train(RLOOTrainer, folder, tmp_path, max_steps=4)
    finally:
        unpatch_trl()
    compare_curves(found, expected)


def test_mixture_of_experts():
    """The load-balancing loss, which the model makes beside its head."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=48, **sizes, **heads)
    model = MixtralForCausalLM(config)
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    for options in ({"loss_type": "dapo"}, {"loss_type": "grpo", "entropy_coef": 0.02}):
        found = compare(model.train(), accumulation=2, beta=0.1, **options)
        assert found["metrics"]["aux_loss"][0] > 0
        assert found["grads"]["model.layers.0.mlp.gate.weight"].abs().max() > 1e-5


def test_every_input_of_a_model_is_passed_on():
    """The keywords, pictures and all, by which TRL's loss calls its forward pass."""
    from trl import GRPOTrainer

    from grpo_engine.integrations.trl_loss import MODEL_INPUTS

    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    name = "self._get_per_token_logps_and_entropies"
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]
    assert [[k.arg for k in call.keywords] for call in calls] == [
        ["compute_entropy", "compute_aux_loss", *MODEL_INPUTS]
    ]
