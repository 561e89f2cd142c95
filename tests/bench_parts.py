"""What the tests of grpo-engine bench share: a job of two lines, and times made up."""

import torch

from grpo_engine.bench.cases import Case
from grpo_engine.bench.provider import Provider
from grpo_engine.bench.timing import Spread

CPU = torch.device("cpu")
ADVANTAGES = Case("four groups", "group_advantages", {"N": 16, "G": 4})


def exact(inputs, backward):
    groups = inputs["rewards"].view(-1, inputs["group_size"])
    centred = groups - groups.mean(1, keepdim=True)
    return {"advantages": (centred / (groups.std(1, keepdim=True) + 1e-4)).view(-1)}


class Counted:
    """A provider's run that counts its calls and notes them in a shared list."""

    def __init__(self, name, run, calls):
        self.name, self.run, self.calls = name, run, calls

    def __call__(self, inputs, backward):
        self.calls.append(self.name)
        return self.run(inputs, backward)


def provider(name, run, calls, **more):
    return Provider(name, "group_advantages", None, Counted(name, run, calls), **more)


def spread(median, noise=0.0):
    half = median * noise / 2
    return Spread(median, median - half, median + half, median - half, median + half)
