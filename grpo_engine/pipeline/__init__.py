"""``grpo-engine r1``: every stage of DeepSeek-R1 in one command, or any other list of stages.

``config`` the YAML: stages, shared fields, references; ``stages`` the kinds of stages there are;
``freshness`` what has to be made again, and why; ``run`` the loop; ``budget`` and ``memory`` what
a plan will cost; ``plan`` the dry run. ``grpo_engine.lineage`` reads what a pipeline left behind.
"""
