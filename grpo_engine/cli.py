"""``grpo-engine <verb> [--recipe NAME | --config FILE.yaml] [--field value ...]``

Exit codes: 0 success; 1 a run or check that failed; 2 the user's input is wrong (one line, no
traceback); 130 / 143 stopped by Ctrl-C / SIGTERM after saving.

Verbs import what they need only when they run, so ``--help`` and input errors are quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

from grpo_engine import __version__
from grpo_engine.interrupt import INTERRUPTED, came_of_stop, quitting_on_ctrl_c
from grpo_engine.types import GeneratorError, UserError

USAGE = """\
grpo-engine {version}

  grpo-engine r1 [--recipe NAME | --config FILE.yaml] [--STAGE.field value ...]
                   every stage of DeepSeek-R1, one after another; goes on where it was stopped
       --dry-run         check every stage, print the plan with its tokens and memory; r1 --help
  grpo-engine grpo [--recipe NAME | --config FILE.yaml] [--field value ...]
                   train a policy with GRPO
       --resume [DIR]    continue the run in DIR (default: output_dir) from its newest checkpoint
       --overwrite       replace the run that output_dir holds
       --dry-run         print tokens and memory, check everything, print the plan, train nothing
  grpo-engine sft [--recipe NAME | --config FILE.yaml] [--field value ...]
                   fine-tune on prompts with completions, or on conversations; flags as grpo
  grpo-engine distill [--recipe NAME | --config FILE.yaml] [--field value ...]
                   the same for a student on a teacher's answers; flags as grpo
  grpo-engine reward-model [--recipe NAME | --config FILE.yaml] [--field value ...]
                   train a scalar head on preference pairs (helpful) or safety labels; flags as grpo
  grpo-engine sample [--recipe NAME | --config FILE.yaml] [--field value ...]
                   sample answers and keep the right and readable ones as training data
                   (cold start, rejection sampling); goes on where it was stopped
  grpo-engine preferences [--recipe NAME | --config FILE.yaml] [--field value ...]
                   pairs judged by a chat model (helpful), or answers labelled safe or unsafe;
                   goes on where it was stopped
  grpo-engine eval --data FILE [--config FILE.yaml] [--field value ...]
                   pass@1, pass@k and cons@k of a model; goes on where it was stopped
       --overwrite       begin anew in output_dir
       --dry-run         print tokens and memory, check everything, print the plan, sample nothing
  grpo-engine bench [--quick] [--job NAME] [--compare BASELINE] ...
                   every kernel beside plain torch and installed rivals; bench --help
  grpo-engine report DIR        write DIR/report.html again
  grpo-engine doctor [--json]   versions, devices, and every kernel against its reference

Recipes of a verb:
{recipes}
Fields:  grpo-engine <verb> --help
"""


class Stage(NamedTuple):
    """A verb with a configuration. ``run(config, recipe=, overwrite=, dry_run=)`` returns the exit
    code; one that ``resumes`` also takes ``resume``, another goes on where it stopped."""

    config: str  # module:class
    run: str  # module:function
    resumes: bool = True


STAGES = {
    "grpo": Stage("grpo_engine.config:GRPOConfig", "grpo_engine.train:train_grpo"),
    "sft": Stage("grpo_engine.sft_config:SFTConfig", "grpo_engine.sft:run_sft"),
    "distill": Stage("grpo_engine.sft_config:DistillConfig", "grpo_engine.sft:run_sft"),
    "reward-model": Stage(
        "grpo_engine.reward_model_config:RewardModelConfig",
        "grpo_engine.reward_model:run_reward_model",
    ),
    "sample": Stage(
        "grpo_engine.rejection.config:SampleConfig", "grpo_engine.rejection.run:run_sample", False
    ),
    "preferences": Stage(
        "grpo_engine.preferences.config:PreferencesConfig",
        "grpo_engine.preferences.run:run_preferences",
        False,
    ),
    "eval": Stage(
        "grpo_engine.evaluation.config:EvalConfig", "grpo_engine.evaluation.run:run_eval", False
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (also the console script's)."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(args)
        sys.stdout.flush()  # a closed pipe must show itself here
        return code
    except UserError as error:
        print(f"grpo-engine: error: {error}", file=sys.stderr)
        return 2
    except GeneratorError as error:  # a run ends with its last step saved before it comes to this
        print(f"grpo-engine: error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, ImportError, SystemError) as error:
        if not came_of_stop(error):
            raise
        # before or after a run; inside one, its session saves first
        print(f"\n{INTERRUPTED}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the exit's own flush
        return 141


def _dispatch(args: list[str]) -> int:
    verbs = {verb: partial(_stage, verb) for verb in STAGES}
    verbs |= {"r1": _r1, "bench": _bench, "report": _report, "doctor": _doctor}
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE.format(version=__version__, recipes=_recipes()), end="")
        return 0
    if args[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb, rest = args[0], args[1:]
    if verb not in verbs:
        raise UserError(f"{verb}: no such verb; there are {', '.join(verbs)}")
    if verb in ("report", "doctor") and {"-h", "--help"} & set(rest):
        return _dispatch([])
    return verbs[verb](rest)


def _recipes() -> str:
    """The recipes in the package, a line or more a verb."""
    with quitting_on_ctrl_c():
        from grpo_engine.settings import load_recipe, recipe_names

    by_verb: dict[str, list[str]] = {}
    for name in recipe_names():
        by_verb.setdefault(str(load_recipe(name).get("stage")), []).append(name)
    lines = []
    for verb in sorted(by_verb, key=[*STAGES, *by_verb].index):
        names = ", ".join(by_verb[verb])
        lines += wrap(names, 98, initial_indent=f"  {verb:<15}", subsequent_indent=" " * 17)
    return "\n".join(lines)


def parse_flags(
    args: list[str], switches: Sequence[str] = (), optional: Sequence[str] = ()
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """``--name value`` and ``--name=value`` pairs in order, and the special flags among them.

    ``switches`` take no value; ``optional`` may stand without one (then True). Hyphens in names
    read as underscores.
    """
    pairs: list[tuple[str, str]] = []
    special: dict[str, Any] = {}
    position = 0
    while position < len(args):
        word = args[position]
        position += 1
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word}: expected --field value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in switches:
            if equals:
                raise UserError(f"--{name}={value}: takes no value")
            special[name] = True
            continue
        if not equals:
            # a value may be negative (-1) but never starts with "--"
            if position < len(args) and not args[position].startswith("--"):
                value = args[position]
                position += 1
            elif name in optional:
                special[name] = True
                continue
            else:
                raise UserError(f"--{name}: needs a value")
        if name in optional or name in ("recipe", "config"):
            special[name] = value
        else:
            pairs.append((name, value))
    return pairs, special


def _stage(verb: str, args: list[str]) -> int:
    """Run one stage of training or judging: its configuration from recipe, file, folder and flags,
    then its run function."""
    with quitting_on_ctrl_c():
        from grpo_engine.settings import build_config

    stage = STAGES[verb]
    config_class = _named(stage.config)
    if {"-h", "--help"} & set(args):
        usage = f"grpo-engine {verb} [--recipe NAME | --config FILE.yaml] [--field value ...]"
        print(f"{usage}\n\nFields (default):\n{config_class.help_text()}")
        return 0
    optional = ("resume",) if stage.resumes else ()
    pairs, special = parse_flags(args, switches=("overwrite", "dry_run"), optional=optional)
    resume = special.get("resume")
    if resume is True:
        resume = dict(pairs).get("output_dir")
        if resume is None:
            raise UserError("--resume: name the run's folder")
    config = build_config(_stage_values(verb, pairs, special, resume), config_class, pairs)
    options = {"resume": resume} if stage.resumes else {}
    if resume is not None and "output_dir" in dict(pairs):
        from grpo_engine.run_folder import run_folder

        if run_folder(resume).resolve() != Path(config.output_dir).resolve():
            raise UserError(
                f"--resume {resume} --output_dir {config.output_dir}: a run continues in its folder"
            )
    if special.get("dry_run"):
        with quitting_on_ctrl_c():
            from grpo_engine.pipeline.plan import print_estimate

        print_estimate(verb, config)
    return _named(stage.run)(
        config,
        recipe=special.get("recipe"),
        overwrite=bool(special.get("overwrite")),
        dry_run=bool(special.get("dry_run")),
        **options,
    )


def _stage_values(
    verb: str, pairs: list[tuple[str, str]], special: dict[str, Any], resume: str | None
) -> dict[str, Any]:
    """The fields that the flags are laid over."""
    from grpo_engine.settings import load_recipe, load_yaml

    if "recipe" in special and "config" in special:
        raise UserError(
            f"--recipe {special['recipe']} and --config {special['config']}: give one of them"
        )
    if resume is not None and special.get("overwrite"):
        raise UserError("--resume and --overwrite: give one of them")
    if "recipe" in special:
        return load_recipe(special["recipe"], verb)
    if "config" in special:
        return load_yaml(special["config"])
    if resume is not None:
        from grpo_engine.run_folder import saved_config

        return saved_config(resume)
    if not pairs:
        words = "--recipe NAME, --config FILE.yaml, --resume DIR or --field value flags"
        raise UserError(f"{verb}: needs {words}")
    return {}


def _named(path: str) -> Any:
    """The object that ``module:name`` names."""
    module, _, name = path.partition(":")
    with quitting_on_ctrl_c():
        return getattr(import_module(module), name)


def _r1(args: list[str]) -> int:
    with quitting_on_ctrl_c():
        from grpo_engine.pipeline.command import run_r1, usage

    if {"-h", "--help"} & set(args):
        print(usage(), end="")
        return 0
    pairs, special = parse_flags(args, switches=("overwrite", "dry_run"))
    return run_r1(pairs, special)


def _bench(args: list[str]) -> int:
    if {"-h", "--help"} & set(args):
        from grpo_engine.bench.options import usage

        print(usage(), end="")
        return 0
    pairs, special = parse_flags(args, switches=("quick", "truth", "profile", "list"))
    for name in ("recipe", "config"):
        if name in special:
            raise UserError(f"--{name} {special[name]}: bench has no such flag")
    with quitting_on_ctrl_c():
        from grpo_engine.bench.command import run_bench

    return run_bench(pairs, set(special))


def _report(args: list[str]) -> int:
    if len(args) != 1 or args[0].startswith("-"):
        raise UserError(f"report {' '.join(args)}: needs one argument, the folder of a run")
    with quitting_on_ctrl_c():
        from grpo_engine.report import write_report
        from grpo_engine.report.pipeline import write_pipeline_report
        from grpo_engine.report.pipeline_record import holds_pipeline

    write = write_pipeline_report if holds_pipeline(args[0]) else write_report
    print(write(args[0]))
    return 0


def _doctor(args: list[str]) -> int:
    pairs, special = parse_flags(args, switches=("json",))
    if pairs:
        raise UserError(f"--{pairs[0][0]} {pairs[0][1]}: doctor has no such flag")
    with quitting_on_ctrl_c():
        from grpo_engine.doctor import run_doctor

    return run_doctor(as_json=bool(special.get("json")))


if __name__ == "__main__":
    sys.exit(main())
