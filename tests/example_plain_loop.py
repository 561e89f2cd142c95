"""GRPO in a loop of one's own: a Hugging Face model, torch, and one module of GRPO Engine."""

import torch

from grpo_engine.integrations.pytorch import FusedGRPOLoss, completion_hidden
from grpo_engine.kernels import group_advantages


def train(model, prompt_ids, reward, steps=20, num_generations=8, new_tokens=8, lr=1e-2):
    """Mean reward of each step. ``prompt_ids`` [P, L]; ``reward(completion_ids [R, T]) -> [R]``."""
    loss_fn = FusedGRPOLoss.for_model(model, loss_type="dapo", temperature=1.0, epsilon=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    curve = []
    for _ in range(steps):
        prompts = prompt_ids.repeat_interleave(num_generations, 0)
        with torch.no_grad():
            input_ids = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
        completion_ids = input_ids[:, -new_tokens:]
        rewards = reward(completion_ids)
        advantages = group_advantages(rewards, num_generations)
        hidden = completion_hidden(model, input_ids, torch.ones_like(input_ids), new_tokens)
        loss, metrics, logprobs = loss_fn(hidden, model.lm_head, completion_ids, advantages)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(rewards.mean().item())
    return curve
