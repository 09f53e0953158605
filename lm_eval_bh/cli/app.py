"""The command ``lm-eval-bh``: lists the subcommands, and ends with an exit code and a sentence."""

from __future__ import annotations

import sys
from typing import Any

import typer

from lm_eval_bh.cli.aggregate_command import aggregate
from lm_eval_bh.cli.analyze_command import analyze
from lm_eval_bh.cli.bench_command import bench
from lm_eval_bh.cli.calibrate_command import calibrate
from lm_eval_bh.cli.compare_command import compare
from lm_eval_bh.cli.doctor_command import doctor
from lm_eval_bh.cli.export_command import export
from lm_eval_bh.cli.import_kde_command import import_kde
from lm_eval_bh.cli.import_routing_command import import_routing
from lm_eval_bh.cli.interrupts import INTERRUPTED, NOTHING_HALF_WRITTEN, StoppedByUserError
from lm_eval_bh.cli.league_command import league
from lm_eval_bh.cli.path_command import path
from lm_eval_bh.cli.patterns_command import patterns
from lm_eval_bh.cli.plot_command import plot
from lm_eval_bh.cli.policy_command import policy
from lm_eval_bh.cli.printing import PROGRAM, fail, prepare_streams, warn
from lm_eval_bh.cli.report_command import report
from lm_eval_bh.cli.route_diff_command import route_diff
from lm_eval_bh.cli.run_lm_eval_command import run_lm_eval
from lm_eval_bh.cli.sweep_command import sweep
from lm_eval_bh.cli.tune_command import tune
from lm_eval_bh.cli.verify_command import verify
from lm_eval_bh.cli.view_command import view
from lm_eval_bh.errors import BHError, DataError

FAILED, MISUSED = 1, 2  # exit codes; 3: files were left out, see options.py

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Tools around `lm_eval --model hf-bh`: "
        "adaptive expert selection for mixture-of-experts models."
    ),
)

for command in (
    sweep,
    aggregate,
    compare,
    bench,
    plot,
    report,
    view,
    patterns,
    calibrate,
    analyze,
    tune,
    league,
    export,
    verify,
    doctor,
    path,
):
    app.command()(command)
app.command("import-kde")(import_kde)
app.command("import-routing")(import_routing)
app.command("route-diff")(route_diff)
app.add_typer(policy, name="policy")
app.command(
    "lm-eval",
    context_settings={  # everything behind the name is lm_eval's, --help too
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)(run_lm_eval)

# The base of typer's errors is click's, or that of its own copy of click, and has no public name.
_UsageError: Any = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command, and exit with its code.

    An error of ours or of the operating system ends it with one sentence and code 1, bad usage with
    one sentence and code 2, Ctrl-C with one line and code 130, SIGTERM with one and code 143.
    """
    prepare_streams()
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(prog_name=PROGRAM, standalone_mode=False)
    except StoppedByUserError as stopped:
        warn(f"{PROGRAM}: interrupted: {stopped}.")
        return stopped.code
    except typer.Abort:
        warn(f"{PROGRAM}: interrupted: {NOTHING_HALF_WRITTEN}.")
        return INTERRUPTED
    except BHError as error:
        fail(error)
        return FAILED
    except OSError as error:
        fail(DataError(error))
        return FAILED
    except _UsageError as error:
        return _misused(error)
    if code == INTERRUPTED:  # newer releases of typer catch Ctrl-C themselves
        warn(f"{PROGRAM}: interrupted: {NOTHING_HALF_WRITTEN}.")
    return code if isinstance(code, int) else 0


def _misused(error: Any) -> int:
    """Say what is wrong with the command line; without any arguments, show the help instead."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        command = error.ctx.command_path if error.ctx else PROGRAM
        fail(f"{error.format_message().rstrip('.')} (see '{command} --help').")
    return MISUSED
