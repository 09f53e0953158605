"""The command ``lm-eval-bh``: lists the subcommands, and ends with an exit code and a sentence."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from lm_eval_bh.cli.aggregate_command import aggregate
from lm_eval_bh.cli.bench_command import bench
from lm_eval_bh.cli.calibrate_command import calibrate
from lm_eval_bh.cli.compare_command import compare
from lm_eval_bh.cli.doctor_command import doctor
from lm_eval_bh.cli.examples import examples
from lm_eval_bh.cli.export_command import export
from lm_eval_bh.cli.former_names import Command, Commands
from lm_eval_bh.cli.import_kde_command import import_kde
from lm_eval_bh.cli.import_routing_command import import_routing
from lm_eval_bh.cli.interrupts import INTERRUPTED, NOTHING_HALF_WRITTEN, StoppedByUserError
from lm_eval_bh.cli.league_command import league
from lm_eval_bh.cli.path_command import path
from lm_eval_bh.cli.policy_command import policy
from lm_eval_bh.cli.printing import PROGRAM, fail, prepare_streams, say, warn
from lm_eval_bh.cli.report_command import report
from lm_eval_bh.cli.route_diff_command import route_diff
from lm_eval_bh.cli.run_lm_eval_command import run_lm_eval
from lm_eval_bh.cli.sweep_command import sweep
from lm_eval_bh.cli.tune_command import tune
from lm_eval_bh.cli.verify_command import verify
from lm_eval_bh.cli.view_command import view
from lm_eval_bh.errors import BHError, DataError

FAILED, MISUSED = 1, 2  # exit codes; 3: files were left out, see options.py

# The panels of the help, in its order: what somebody wants to do.
PANELS = MEASURE, LOOK, CHOOSE, SERVE, SET_UP = (
    "Measure",
    "Look at results",
    "Choose a policy",
    "Keep and serve a policy",
    "Set up",
)


class Program(Commands):
    """The command at the root."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the panels."""
        commands: dict[str, Any] = dict(self.commands)
        return sorted(commands, key=lambda name: PANELS.index(commands[name].rich_help_panel))


app = typer.Typer(
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(version(PROGRAM))
        raise typer.Exit


@app.callback(epilog=examples(""))
def program(
    _: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Tools around `lm_eval --model hf-bh`: adaptive expert selection for mixtures of experts."""


def add(to: typer.Typer, command: Any, panel: str | None = None, group: str = "") -> None:
    """List a command in a panel of the help, by the name of its function."""
    name = command.__name__.replace("_", "-")
    shown = examples(f"{group} {name}".strip())
    to.command(name, cls=Command, rich_help_panel=panel, epilog=shown)(command)


COMMANDS: dict[str, tuple[Any, ...]] = {
    MEASURE: (sweep, aggregate, compare, bench, import_routing, route_diff),
    LOOK: (report, view),
    CHOOSE: (tune, league, calibrate),
    SET_UP: (import_kde,),
}
for _panel, _commands in COMMANDS.items():
    for _command in _commands:
        add(app, _command, _panel)
add(policy, export, group="policy")
add(policy, verify, group="policy")
app.add_typer(policy, name="policy", rich_help_panel=SERVE)
add(doctor, path, group="doctor")
app.add_typer(doctor, name="doctor", rich_help_panel=SET_UP)
app.command(
    "lm-eval",
    rich_help_panel=SET_UP,
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
        sentence = error.format_message().replace("Value error, ", "").rstrip(".")
        fail(f"{sentence} (see '{command} --help').")
    return MISUSED
