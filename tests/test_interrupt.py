"""Ctrl-C at awkward moments: while a verb is being imported, and where foreign code makes another
error of it."""

import signal
import subprocess
import sys

import pytest

from grpo_engine import cli
from grpo_engine.interrupt import Interrupt, StopRequested

FLAGS = ["sft", "--model", "miniature", "--dataset", "rows.jsonl"]
# Interrupted while it is imported. Of what is raised then, the initialisation of an extension
# module makes an ImportError, and its importer takes that for a package that is not installed.
MODULE = """
import signal
try:
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        raise ImportError("initialization failed") from error
except ImportError:
    pass
def run(config, **options):
    print("it runs all the same")
    return 0
"""
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from grpo_engine import cli
sys.path.append(sys.argv.pop(1))
cli.STAGES["sft"] = cli.STAGES["sft"]._replace(run="interrupted_module:run")
sys.exit(cli.main(sys.argv[1:]))
"""


def test_while_a_verb_is_imported_ctrl_c_is_one_line(tmp_path):
    (tmp_path / "interrupted_module.py").write_text(MODULE)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *FLAGS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "grpo-engine: interrupted"


def put_in_place(monkeypatch, run):
    """``run`` as what a verb calls."""
    named = cli._named
    runs = {stage.run for stage in cli.STAGES.values()}
    monkeypatch.setattr(cli, "_named", lambda path: run if path in runs else named(path))


@pytest.mark.parametrize("cause", [KeyboardInterrupt, StopRequested])
@pytest.mark.parametrize("kind", [ImportError, SystemError])
def test_an_error_that_was_a_ctrl_c_is_one(monkeypatch, capsys, kind, cause):
    def run(config, **options):
        try:
            raise cause
        except BaseException as error:
            raise kind("initialization failed") from error

    put_in_place(monkeypatch, run)
    assert cli.main(FLAGS) == 130
    assert capsys.readouterr().err.strip() == "grpo-engine: interrupted"


def test_a_package_that_is_missing_is_not_hidden(monkeypatch):
    def run(config, **options):
        raise ImportError("no module named x")

    put_in_place(monkeypatch, run)
    with pytest.raises(ImportError, match="no module named x"):
        cli.main(FLAGS)


def test_a_stop_that_became_an_import_error_is_a_stop():
    with Interrupt() as interrupt, pytest.raises(StopRequested), interrupt.abortable():
        try:
            signal.raise_signal(signal.SIGINT)
        except StopRequested as error:
            raise ImportError("initialization failed") from error
    assert interrupt.exit_code == 130


def test_what_goes_wrong_on_the_way_out_is_not_hidden():
    with Interrupt() as interrupt:
        with pytest.raises(OSError, match="disk full"), interrupt.abortable():
            try:
                signal.raise_signal(signal.SIGINT)
            except StopRequested:
                raise OSError("disk full") from None
        interrupt.signum = None
        with pytest.raises(ImportError), interrupt.abortable():
            raise ImportError("no module named x")
