"""``grpo-engine r1``: its flags, and where its YAML comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_engine.lineage import read_values
from grpo_engine.pipeline import stages
from grpo_engine.pipeline.config import STAGE, read_pipeline
from grpo_engine.pipeline.run import run_pipeline
from grpo_engine.settings import load_recipe, load_yaml, recipe_names
from grpo_engine.types import UserError

USAGE = """\
grpo-engine r1 [--recipe NAME | --config FILE.yaml] [--output_dir DIR] [--stage.field value ...]

Every stage of DeepSeek-R1, or those of your own YAML. The same command goes on where an earlier one
stopped; a stage whose settings, inputs and results are as they were is not made again.

  --recipe NAME            {recipes}
  --config FILE.yaml       a list of stages, as below
  --output_dir DIR         the pipeline's folder; alone it continues the one in DIR
  --field value            a field of all stages that do not set it themselves (seed, device, model)
  --STAGE.field value      a field of one stage: --reasoning-rl.max_steps 10
  --only STAGE[,STAGE]     run these and leave the others as they are
  --from-stage STAGE       run from this one on
  --to-stage STAGE         run up to this one
  --overwrite              what is made again replaces what was there (else it is set aside as
                           STAGE.superseded), and an unfinished stage begins anew
  --dry-run                check every stage's settings, print the plan: inputs, steps, tokens,
                           memory; write nothing

A pipeline is YAML: fields of all stages, and the stages in the order they run. A reference leads to
what a stage further up has made, or to a file in its folder:

  stage: r1
  output_dir: runs/r1
  seed: 0
  model: Qwen/Qwen2.5-7B            # the base: stages without a model of their own start from it
  stages:
    - name: r1-zero
      stage: grpo                   # a verb; the other fields are its settings
      dataset: train.jsonl
    - name: cold-start-data
      stage: sample
      model: "{{r1-zero}}"            # its newest checkpoint
      dataset: train.jsonl
    - name: cold-start-sft
      stage: sft
      dataset: "{{cold-start-data}}/data.jsonl"

Verbs: {kinds}; their fields: grpo-engine <verb> --help
"""


def usage() -> str:
    recipes = ", ".join(recipe_names(STAGE)) or "none in this installation"
    return USAGE.format(recipes=recipes, kinds=", ".join(stages.STAGES))


def run_r1(pairs: Sequence[tuple[str, str]], special: dict[str, Any]) -> int:
    """``pairs``: ``--name value`` flags in order; ``special``: recipe, config and switches. Returns
    the exit code."""
    own: dict[str, list[str]] = {"only": [], "from_stage": [], "to_stage": []}
    for name, value in pairs:
        if name in own:
            own[name].append(value)
        elif name == "resume":
            raise UserError(
                f"--resume {value}: r1 has no such flag; the same command goes on, or --output_dir "
                f"{value} alone"
            )
    pairs = [(name, value) for name, value in pairs if name not in own]
    pipeline = read_pipeline(_values(pairs, special), pairs, stages.STAGES)
    return run_pipeline(
        pipeline,
        stages.STAGES,
        recipe=special.get("recipe"),
        overwrite=bool(special.get("overwrite")),
        dry_run=bool(special.get("dry_run")),
        only=[name.strip() for value in own["only"] for name in value.split(",")],
        from_stage=own["from_stage"][-1] if own["from_stage"] else None,
        to_stage=own["to_stage"][-1] if own["to_stage"] else None,
    )


def _values(pairs: Sequence[tuple[str, str]], special: dict[str, Any]) -> dict[str, Any]:
    recipe, config = special.get("recipe"), special.get("config")
    if recipe is not None and config is not None:
        raise UserError(f"--recipe {recipe} and --config {config}: give one of them")
    if recipe is not None:
        return load_recipe(recipe, STAGE)
    if config is not None:
        return load_yaml(config)
    folder = dict(pairs).get("output_dir")
    if folder is None:
        raise UserError("r1: needs --recipe NAME, --config FILE.yaml, or the --output_dir of one")
    if read_values(Path(folder)) is None:
        raise UserError(f"--output_dir {folder}: holds no pipeline to continue; name a --recipe")
    return load_yaml(str(Path(folder) / "config.yaml"))
