"""The `kvcompress` command. Each subcommand is a module of `commands`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

#: panel -> its commands: name, module and function
PANELS: dict[str, tuple[tuple[str, str], ...]] = {
    "Start here": (("demo", "demo"), ("doctor", "doctor")),
    "Choose settings": (
        ("plan", "plan"),
        ("tune", "tune"),
        ("calibrate", "calibrate"),
        ("train-policy", "train_policy"),
    ),
    "Look inside": (("analyze", "analyze"), ("monitor", "monitor")),
    "Measure": (("eval", "evaluate"), ("experiments", "experiments"), ("lm-eval", "lm_eval")),
    "Serve": (("serve-demo", "serve_demo"),),
}
#: commands whose words are another program's
PASSED_ON = ("lm-eval",)


def build() -> Any:
    """The typer application with all subcommands."""
    import typer

    from .commands.errors import Command, Group
    from .commands.version import root

    app = typer.Typer(cls=Group, pretty_exceptions_enable=False)
    app.callback()(root)
    for panel, commands in PANELS.items():
        for name, module in commands:
            function = getattr(import_module(f".commands.{module}", __package__), module)
            settings: dict[str, Any] = {}
            if name in PASSED_ON:
                passed_on = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
                settings = {"context_settings": passed_on, "add_help_option": False}
            app.command(name, cls=Command, rich_help_panel=panel, **settings)(function)
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
