"""``grpo-engine eval``: pass@1, pass@k and cons@k of a model on a set of problems.

``config`` the fields; ``problems`` rows as problems of one kind; ``samples`` the file of drawn
samples, which is also the cache; ``votes`` which answers are the same; ``results`` the figures;
``run`` the loop. The estimators themselves are in ``grpo_engine.evaluate``.
"""
