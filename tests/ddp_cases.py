"""What test_integrations_ddp.py runs in every process of a gloo group.

Written to the folder given: of each rank, the gradients of one plain step in its DDP module; of
rank 0, what TRL's trainer and ours log of a few steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from trl_training import train

from grpo_engine.integrations.contract import Unsupported
from grpo_engine.integrations.pytorch import FusedGRPOLoss, completion_hidden

ROWS, PROMPT, WIDTH = 6, 4, 8


class Step(nn.Module):
    """What DDP wraps: the calls of the README's plain PyTorch section."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = FusedGRPOLoss.for_model(model, loss_type="grpo", beta=0.1)

    def forward(self, rows: dict[str, torch.Tensor], denominator: float) -> torch.Tensor:
        hidden = completion_hidden(self.model, rows["input_ids"], rows["attention_mask"], WIDTH)
        return self.loss_fn(
            hidden,
            self.model.lm_head,
            rows["input_ids"][:, -WIDTH:],
            rows["advantages"],
            rows["attention_mask"][:, -WIDTH:],
            ref_logprobs=rows["ref_logprobs"],
            denominator=denominator,
        ).loss


def make_rows() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    attention = torch.ones(ROWS, PROMPT + WIDTH, dtype=torch.long)
    for row in range(ROWS):
        attention[row, PROMPT + 2 + row :] = 0
    return {
        "input_ids": torch.randint(3, 40, (ROWS, PROMPT + WIDTH), generator=g),
        "attention_mask": attention,
        "advantages": torch.randn(ROWS, generator=g),
        "ref_logprobs": -3 * torch.rand(ROWS, WIDTH, generator=g),
    }


def plain_step(folder: Path, rank: int, world: int) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if world == 1:
        step, mine = Step(model), make_rows()
    else:
        wrapped = DistributedDataParallel(model)
        mine = {name: x[rank::world] for name, x in make_rows().items()}
        try:
            completion_hidden(wrapped, mine["input_ids"], mine["attention_mask"], WIDTH)
        except Unsupported as error:
            assert "wrap a module whose forward calls completion_hidden" in str(error)
        else:
            raise AssertionError("a DDP model was taken")
        step = DistributedDataParallel(Step(model))
    step(mine, ROWS / world).backward()  # DDP averages over ranks
    return {name: p.grad for name, p in model.named_parameters()}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.save(plain_step(folder / "tiny", rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()
    from trl import GRPOTrainer as Theirs

    from grpo_engine.integrations.trl import GRPOTrainer as Ours

    options = {"ddp_backend": "gloo", "max_steps": 4}
    runs = {
        kind.__module__: train(kind, folder / "tiny", folder / f"run{rank}", **options)
        for kind in (Theirs, Ours)
    }
    if rank == 0:
        torch.save(runs, folder / "runs.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
