"""``grpo-engine <verb> [--recipe NAME | --config FILE.yaml] [--field value ...]``

Exit codes: 0 success; 1 a run or check that failed; 2 the user's input is wrong (one line, no
traceback); 130 / 143 stopped by Ctrl-C / SIGTERM after saving.

Verbs import what they need only when they run, so ``--help`` and input errors are quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_engine import __version__
from grpo_engine.types import UserError

USAGE = """\
grpo-engine {version}

  grpo-engine grpo [--recipe NAME | --config FILE.yaml] [--field value ...]
                   train a policy with GRPO
       --resume [DIR]    continue the run in DIR (default: output_dir) from its newest checkpoint
       --overwrite       replace the run that output_dir holds
       --dry-run         check everything, print the plan, train nothing
  grpo-engine eval --data FILE [--config FILE.yaml] [--field value ...]
                   pass@1, pass@k and cons@k of a model; goes on where it was stopped
       --overwrite       begin anew in output_dir
       --dry-run         check everything, print the plan, sample nothing
  grpo-engine bench [--quick] [--job NAME] [--compare BASELINE] ...
                   every kernel beside plain torch and installed rivals; bench --help
  grpo-engine report DIR        write DIR/report.html again
  grpo-engine doctor [--json]   versions, devices, and every kernel against its reference

Recipes: {recipes}
Fields:  grpo-engine grpo --help, grpo-engine eval --help
"""


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
    except KeyboardInterrupt:  # before or after a run; inside one, train.py saves first
        return 130
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the exit's own flush
        return 141


def _dispatch(args: list[str]) -> int:
    verbs = {"grpo": _grpo, "eval": _eval, "bench": _bench, "report": _report, "doctor": _doctor}
    if not args or args[0] in ("-h", "--help", "help"):
        from grpo_engine.config import recipe_names

        print(USAGE.format(version=__version__, recipes=", ".join(recipe_names())), end="")
        return 0
    if args[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb, rest = args[0], args[1:]
    if verb not in verbs:
        raise UserError(f"{verb}: no such verb; there are {', '.join(verbs)}")
    if verb not in ("grpo", "eval", "bench") and {"-h", "--help"} & set(rest):
        return _dispatch([])
    return verbs[verb](rest)


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


def _grpo(args: list[str]) -> int:
    if "--help" in args or "-h" in args:
        _print_fields()
        return 0
    from grpo_engine.config import apply_overrides, build_config, load_recipe, load_yaml

    pairs, special = parse_flags(args, switches=("overwrite", "dry_run"), optional=("resume",))
    if "recipe" in special and "config" in special:
        raise UserError(
            f"--recipe {special['recipe']} and --config {special['config']}: give one of them"
        )
    resume = special.get("resume")
    if resume is not None and special.get("overwrite"):
        raise UserError("--resume and --overwrite: give one of them")
    if "recipe" in special:
        values = load_recipe(special["recipe"])
    elif "config" in special:
        values = load_yaml(special["config"])
    elif resume is not None:
        from grpo_engine.prepare import saved_config

        resume = dict(pairs).get("output_dir") if resume is True else resume
        if resume is None:
            raise UserError("--resume: name the run's folder")
        values = saved_config(resume)
    elif pairs:
        values = {}
    else:
        raise UserError(
            "grpo: needs --recipe NAME, --config FILE.yaml, --resume DIR or --field value flags"
        )
    config = build_config(apply_overrides(values, pairs))
    if isinstance(resume, str) and "output_dir" in dict(pairs):
        from grpo_engine.prepare import run_folder

        if run_folder(resume).resolve() != Path(config.output_dir).resolve():
            raise UserError(
                f"--resume {resume} --output_dir {config.output_dir}: a run continues in its folder"
            )
    from grpo_engine.train import train_grpo

    return train_grpo(
        config,
        recipe=special.get("recipe"),
        resume=config.output_dir if resume is True else resume,
        overwrite=bool(special.get("overwrite")),
        dry_run=bool(special.get("dry_run")),
    )


def _print_fields() -> None:
    from grpo_engine.config import GRPOConfig

    print(
        "grpo-engine grpo [--recipe NAME | --config FILE.yaml] [--field value ...]\n\n"
        "Fields (default):"
    )
    for name, field in GRPOConfig.model_fields.items():
        note = f"  {field.description}" if field.description else ""
        print(f"  --{name} ({field.get_default(call_default_factory=True)!r}){note}")


def _eval(args: list[str]) -> int:
    from grpo_engine.evaluation.config import EvalConfig, build_eval_config

    if {"-h", "--help"} & set(args):
        usage = "grpo-engine eval --data FILE [--config FILE.yaml] [--field value ...]"
        print(f"{usage}\n\nFields (default):\n{EvalConfig.help_text()}")
        return 0
    pairs, special = parse_flags(args, switches=("overwrite", "dry_run"))
    if "recipe" in special:
        raise UserError(f"--recipe {special['recipe']}: eval has no recipes")
    values: dict[str, Any] = {}
    if "config" in special:
        from grpo_engine.config import load_yaml

        values = load_yaml(special["config"])
    config = build_eval_config(values, pairs)
    from grpo_engine.evaluation.run import run_eval

    return run_eval(
        config, overwrite=bool(special.get("overwrite")), dry_run=bool(special.get("dry_run"))
    )


def _bench(args: list[str]) -> int:
    if {"-h", "--help"} & set(args):
        from grpo_engine.bench.options import usage

        print(usage(), end="")
        return 0
    pairs, special = parse_flags(args, switches=("quick", "truth", "profile", "list"))
    for name in ("recipe", "config"):
        if name in special:
            raise UserError(f"--{name} {special[name]}: bench has no such flag")
    from grpo_engine.bench.command import run_bench

    return run_bench(pairs, set(special))


def _report(args: list[str]) -> int:
    if len(args) != 1 or args[0].startswith("-"):
        raise UserError(f"report {' '.join(args)}: needs one argument, the folder of a run")
    from grpo_engine.report import write_report

    print(write_report(args[0]))
    return 0


def _doctor(args: list[str]) -> int:
    pairs, special = parse_flags(args, switches=("json",))
    if pairs:
        raise UserError(f"--{pairs[0][0]} {pairs[0][1]}: doctor has no such flag")
    from grpo_engine.doctor import run_doctor

    return run_doctor(as_json=bool(special.get("json")))


if __name__ == "__main__":
    sys.exit(main())
