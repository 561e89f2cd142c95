"""Training a reward model: losses, gradients, rows and batches."""

import math

import numpy as np
import pytest
import torch
from reward_model_cases import (
    make_inputs,
    make_labels,
    make_pairs,
    make_run,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from grpo_engine.judged_rows import read_judged_rows, split_off
from grpo_engine.reward_model import (
    pairwise_loss,
    pointwise_loss,
    score_metrics,
)
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.rewards.model import ScoreCard
from grpo_engine.types import UserError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


# -- losses ----------------------------------------------------------------------------------------


def test_pairwise_loss_is_minus_the_log_likelihood_of_bradley_and_terry():
    chosen = torch.tensor([1.5, -2.0, 40.0, -200.0], requires_grad=True)
    rejected = torch.tensor([0.5, 1.0, -40.0, 0.0], requires_grad=True)
    losses = pairwise_loss(chosen, rejected)
    expected = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(3.0)), 0.0, 200.0]
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-6, atol=1e-30)
    losses.sum().backward()
    # d/d chosen = -(1 - P(chosen preferred)), and the opposite for rejected
    preferred = 1 / (1 + np.exp(-np.array([1.0, -3.0, 80.0, -200.0])))
    np.testing.assert_allclose(chosen.grad, preferred - 1, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_margin_and_centering():
    chosen, rejected = torch.tensor([1.5]), torch.tensor([0.5])
    shifted = pairwise_loss(chosen, rejected, margin=0.7)
    assert shifted.item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-6)
    centred = pairwise_loss(chosen, rejected, centering=0.1)
    assert centred.item() == pytest.approx(math.log1p(math.exp(-1.0)) + 0.1 * 4.0, rel=1e-6)


def test_pointwise_loss_is_the_cross_entropy():
    scores = torch.tensor([2.0, 2.0, -1.0, -1.0, 90.0], requires_grad=True)
    labels = torch.tensor([1, 0, 1, 0, 0.0])
    losses = pointwise_loss(scores, labels)
    p = 1 / (1 + np.exp(-np.array([2.0, 2.0, -1.0, -1.0])))
    expected = [-math.log(p[0]), -math.log(1 - p[1]), -math.log(p[2]), -math.log(1 - p[3]), 90.0]
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-5)
    losses.sum().backward()
    np.testing.assert_allclose(scores.grad[:4], p - [1, 0, 1, 0], rtol=1e-5)


# -- gradients -------------------------------------------------------------------------------------


def gradients(run, batch):
    loss, metrics = run._gradients(batch)
    found = {n: p.grad.clone() for n, p in run.policy.weights().items() if p.grad is not None}
    run.optimizer.zero_grad(set_to_none=True)
    return loss, metrics, found


def assert_same_gradients(one, other, tolerance=2e-6):
    assert one.keys() == other.keys()
    for name in one:
        scale = one[name].abs().max().clamp_min(1e-8)
        assert (one[name] - other[name]).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_loss_and_gradient_are_those_of_plain_torch(inputs, tmp_path, kind):
    """transformers' own model, padded, autograd through the formula as written."""
    rows = (make_pairs if kind == "helpful" else make_labels)(6)
    run = make_run(inputs, rows, kind, center_rewards_coefficient=0.05 * (kind == "helpful"))
    run.policy.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def scores_of(column):
        texts = []
        for row in rows:
            text = row[column]
            if kind == "helpful":
                text = text.rpartition("</think>")[2]
            texts.append(row["prompt"] + text + tokenizer.eos_token)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return model(**inputs).logits[:, 0]

    if kind == "helpful":
        chosen, rejected = scores_of("chosen"), scores_of("rejected")
        likelihood = torch.exp(chosen) / (torch.exp(chosen) + torch.exp(rejected))
        expected = (-likelihood.log() + 0.05 * (chosen + rejected) ** 2).mean()
    else:
        safe = 1 / (1 + torch.exp(-scores_of("completion")))
        labels = torch.tensor([row["label"] for row in rows])
        expected = -torch.where(labels == 1, safe, 1 - safe).log().mean()
    expected.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}

    loss, _, found = gradients(run, np.arange(6))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(found, wanted, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_gradients_do_not_depend_on_the_micro_batches(inputs, kind):
    rows = (make_pairs if kind == "helpful" else make_labels)(12)
    whole = make_run(inputs, rows, kind, max_tokens_per_microbatch=4096)
    cut = make_run(inputs, rows, kind, max_length=64, max_tokens_per_microbatch=128)
    batch = np.array([3, 0, 7, 11, 5])
    loss, metrics, expected = gradients(whole, batch)
    cut_loss, cut_metrics, found = gradients(cut, batch)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    assert cut_metrics == pytest.approx(metrics, rel=1e-4)
    assert_same_gradients(expected, found)


def test_gradient_checkpointing_does_not_change_the_gradient(inputs):
    rows = make_pairs(6)
    plain = make_run(inputs, rows)
    saving = make_run(inputs, rows)
    saving.policy = RewardNetwork.from_model(
        str(inputs / "model"), device="cpu", seed=1, gradient_checkpointing=True
    )
    _, _, expected = gradients(plain, np.arange(6))
    saving._gradients(np.arange(6))
    found = {n: p.grad for n, p in saving.policy.weights().items()}
    assert_same_gradients(expected, found)


def test_metrics_of_a_batch():
    pairs = np.array([[1.0, 0.0], [2.0, 3.0], [5.0, 1.0], [0.0, 0.0]])
    assert score_metrics(pairs, None) == {
        "accuracy": 0.5,
        "margin": 1.0,
        "chosen_reward": 2.0,
        "rejected_reward": 1.0,
    }
    scores = np.array([[2.0], [-1.0], [-3.0]])
    both = score_metrics(scores, np.array([1.0, 1.0, 0.0]))
    assert both == {
        "accuracy": pytest.approx(2 / 3),
        "safe_reward": 0.5,
        "unsafe_reward": -3.0,
        "margin": 3.5,
    }
    assert "margin" not in score_metrics(scores, np.ones(3))


# -- rows and batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch"), [(10, 4), (8, 4), (3, 8), (5, 1)])
def test_every_row_comes_once_an_epoch(inputs, rows, batch):
    run = make_run(inputs, make_pairs(rows), batch_size=batch, num_train_epochs=3)
    per_epoch = -(-rows // batch)
    assert run.total_steps == 3 * per_epoch
    epochs = [
        np.concatenate([run.batch(e * per_epoch + k) for k in range(per_epoch)]).tolist()
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert all(len(run.batch(k)) <= batch for k in range(run.total_steps))
    if rows > 4:
        assert epochs[0] != epochs[1]


def test_max_steps_cuts_the_epochs_short(inputs):
    assert make_run(inputs, make_pairs(20), max_steps=2).total_steps == 2
    assert make_run(inputs, make_pairs(20), max_steps=99).total_steps == 3


def test_a_prompt_is_on_one_side_only():
    rows = [{"prompt": f"p{i % 10}", "n": i} for i in range(50)]
    train, held_out = split_off(rows, 0.3, seed=0)
    assert len(train) + len(held_out) == 50
    assert len({row["prompt"] for row in held_out}) == 3
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in train}
    shuffled = rows[::-1]
    again = split_off(shuffled, 0.3, seed=0)[1]
    assert {row["n"] for row in again} == {row["n"] for row in held_out}
    assert split_off(rows, 0.3, seed=1)[1] != held_out
    assert len(split_off(rows, 0.001, seed=0)[1]) == 5  # never none
    with pytest.raises(UserError, match="one prompt only"):
        split_off(rows[:1], 0.5, seed=0)


def test_lengths_of_answers_leave_the_prompt_out(inputs):
    rows = [{"prompt": "1+1?", "chosen": "abc", "rejected": "<think>xx</think> ab "}]
    run = make_run(inputs, rows)
    assert run.rows.answer_lengths.tolist() == [3, 2]
    assert run.rows.lengths.tolist() == [4 + 3 + 1, 4 + 2 + 1]


def test_rows_that_are_left_out(inputs):
    network = RewardNetwork.from_model(str(inputs / "model"), device="cpu")
    card = ScoreCard("helpful", "summary")
    rows = [
        {"prompt": "1", "chosen": "<think>a</think>same", "rejected": "<think>b</think>same"},
        {"prompt": "2", "chosen": "yes", "rejected": "no" * 30},
        {"prompt": "3", "chosen": "yes", "rejected": "no"},
    ]
    kept, left_out = read_judged_rows(
        rows,
        card,
        network,
        source="rows",
        max_length=20,
        long_rows="skip",
        unusable_rows="skip",
    )
    assert len(kept) == 1 and kept.lengths.tolist() == [5, 4]
    assert left_out == {"long_rows": 1, "unusable_rows": 1}
    with pytest.raises(UserError, match="row 1.*the same within scope 'summary'"):
        read_judged_rows(rows, card, network, source="rows", max_length=20)
    with pytest.raises(UserError, match="row 1.*62 tokens.*max_length=20"):
        read_judged_rows(rows[1:], card, network, source="rows", max_length=20)
    with pytest.raises(UserError, match="no row is left"):
        read_judged_rows(rows[1:2], card, network, source="rows", max_length=9, long_rows="skip")


def test_answers_as_messages_and_labels_as_words(inputs):
    network = RewardNetwork.from_model(str(inputs / "model"), device="cpu")

    def read(kind, row):
        card = ScoreCard(kind, "response")
        return read_judged_rows([row], card, network, source="rows", max_length=64)[0]

    message = [{"role": "assistant", "content": "yes"}]
    pair = read("helpful", {"prompt": "a", "chosen": message, "rejected": "no"})
    assert pair.lengths.tolist() == [5, 4]
    for label, value in (("safe", 1.0), ("unsafe", 0.0), (True, 1.0), (0, 0.0)):
        row = {"prompt": "a", "completion": "b", "label": label}
        assert read("safety", row).labels.tolist() == [value]
