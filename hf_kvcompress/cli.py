"""The `kvcompress` command. Each subcommand is a module of `commands`."""

from __future__ import annotations

import sys
from typing import Any


def build() -> Any:
    """The typer application with all subcommands."""
    import typer

    from .commands.calibrate import calibrate
    from .commands.demo import demo
    from .commands.doctor import doctor
    from .commands.evaluate import evaluate
    from .commands.lm_eval import lm_eval
    from .commands.plan import plan
    from .commands.serve_demo import serve_demo
    from .commands.train_policy import train_policy
    from .commands.tune import tune

    app = typer.Typer(help="Compressed key-value caches for transformers.", no_args_is_help=True, add_completion=False)
    app.command()(calibrate)
    app.command()(demo)
    app.command()(doctor)
    app.command("eval")(evaluate)
    passed_on = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command("lm-eval", context_settings=passed_on, add_help_option=False)(lm_eval)
    app.command()(plan)
    app.command("serve-demo")(serve_demo)
    app.command()(tune)
    app.command("train-policy")(train_policy)
    return app


def main() -> None:
    """Entry point of the console script."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"kvcompress needs {error.name}: pip install 'hf_kvcompress[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    build()(prog_name="kvcompress")


if __name__ == "__main__":
    main()
