"""Answers drawn from a frozen model and kept as they come: what ``grpo-engine eval``, ``sample``
and ``preferences`` have in common.

``model`` a model with its sampler; ``series`` which answers are to be drawn, each by its own seed;
``samples`` the file they are kept in, from which a stopped run goes on; ``folder`` whose folder it
is; ``work`` the run around it: check, draw, make the results, say how it ended.
"""
