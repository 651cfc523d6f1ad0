"""gradsketch explore: ask an index in a browser."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from gradsketch.cli.command import Command
from gradsketch.cli.index import model_of
from gradsketch.cli.loading import load
from gradsketch.errors import GradsketchError
from gradsketch.table import one_line, printable

if TYPE_CHECKING:
    from gradsketch.explorer.session import Session

__all__ = ["COMMAND", "ExploreOptions"]


@dataclass(frozen=True)
class ExploreOptions:
    """Ask an index in a browser: questions, their proponents and opponents, rows, outliers, sources.

    The page is served on 127.0.0.1 to whoever has the link that is printed, and to no one else. Without the model, rows
    can be read, and their neighbours and outliers found.

    Example: gradsketch explore runs/facts
    """

    index: tyro.conf.Positional[str]
    """Folder or URI of the index."""
    model: str | None = None
    """Name or folder of the model; by default the one the index was made with."""
    device: str = "auto"
    """cpu, cuda, …"""
    port: int = 0
    """Port on 127.0.0.1; 0 takes any that is free."""
    no_browser: bool = False
    """Print the link, and open no browser."""


def run(options: ExploreOptions) -> int:
    """Serve the page until Ctrl-C."""
    from gradsketch.explorer.serve import require_web, serve

    require_web()
    session = opened(options)

    def ready(link: str) -> None:
        print(f"Open {link}\nIt is for you alone; Ctrl-C ends it.", flush=True)
        if not options.no_browser:
            webbrowser.open(link)

    serve(session, options.port, ready)
    return 0


def opened(options: ExploreOptions) -> Session:
    """Return the index with its model, or without one that was not asked for by name and cannot be loaded.

    Raises:
        GradsketchError: there is no index, or the model that was named cannot be loaded.
    """
    from gradsketch.attribution.description import Description
    from gradsketch.attribution.index import Index
    from gradsketch.explorer.session import Session
    from gradsketch.store.folder import open_folder

    Description.read(open_folder(options.index))  # a wrong path is found out before the model is loaded
    try:
        chosen = model_of(options.index, options.model, options.device)
        model, task = load(chosen)
    except GradsketchError as error:
        if options.model is not None:
            raise
        missing = one_line(str(error))
        print(printable(f"{options.index} without a model: {missing}"), flush=True)
        return Session(Index.open(options.index), missing=missing)
    loaded = printable(f"{chosen.model} ({type(task).__name__})")
    print(printable(f"{options.index} with {loaded}"), flush=True)
    return Session(Index.open(options.index, task=task), model, loaded=loaded)


COMMAND = Command("explore", "ask an index in a browser", ExploreOptions, run)
