"""The routes of the page: thin, because a session answers and a guard stands before all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from gradsketch.attribution.scoring import DAMPING
from gradsketch.errors import GradsketchError
from gradsketch.explorer.downloads import FORMATS, download
from gradsketch.explorer.guard import Guard
from gradsketch.explorer.session import Ask, Neighbours, Session
from gradsketch.explorer.view import shown_answer, shown_page, shown_texts
from gradsketch.plain import as_json, to_plain
from gradsketch.report.page import asset
from gradsketch.table import one_line

__all__ = ["create_app"]

_Found = TypeVar("_Found")
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_LONGEST = 500  # characters of an error


@dataclass(frozen=True)
class RowsWanted:
    """A page of rows; with ``score``, of rows by their score for themselves."""

    where: dict[str, list[Any]] = field(default_factory=dict)
    words: str = ""
    order: str = "row"
    offset: int = 0
    count: int = 20
    score: str = "ridge"
    damping: float | str = DAMPING


@dataclass(frozen=True)
class SourcesWanted:
    """The sums of an answer's question by a column."""

    answer: str
    column: str
    question: int = 0


@dataclass(frozen=True)
class ComparisonWanted:
    """Two answers, each with the number of a question."""

    first: tuple[str, int]
    second: tuple[str, int]


@dataclass(frozen=True)
class ColoursWanted:
    """An answer, and how many hits of each list are to be coloured."""

    answer: str
    top: int = 5


def create_app(session: Session, token: str) -> Guard:
    """Return the ASGI application that asks a session, behind a guard with this token."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _add_page(app)
    _add_questions(app, session)
    _add_rows(app, session)
    app.exception_handler(GradsketchError)(_refused)
    app.exception_handler(RequestValidationError)(_misread)
    app.exception_handler(HTTPException)(_misread)
    app.exception_handler(Exception)(_failed)
    return Guard(app, token)


def _add_page(app: FastAPI) -> None:
    def text(name: str, content: str) -> None:
        kind = _TYPES[name.rsplit(".", 1)[-1]]
        path = "/" if name == "index.html" else f"/{name}"
        app.get(path)(lambda: Response(content, media_type=f"{kind}; charset=utf-8"))

    for name in ("index.html", "page.css", "page.js"):
        text(name, (files("gradsketch.explorer") / "page" / name).read_text(encoding="utf-8"))
    text("report.css", asset("page.css"))
    text("reading.js", asset("reading.js"))


def _add_questions(app: FastAPI, session: Session) -> None:
    @app.post("/api/ask")
    async def ask(wanted: Ask) -> Response:
        return _json(shown_answer(await _aside(lambda: session.ask(wanted))))

    @app.post("/api/colours")
    async def colours(wanted: ColoursWanted) -> Response:
        return _json(shown_answer(await _aside(lambda: session.explain(wanted.answer, wanted.top))))

    @app.post("/api/neighbours")
    async def neighbours(wanted: Neighbours) -> Response:
        return _json(shown_answer(await _aside(lambda: session.neighbours(wanted))))

    @app.post("/api/sources")
    async def sources(wanted: SourcesWanted) -> Response:
        found = await _aside(lambda: session.sources(wanted.answer, wanted.column, wanted.question))
        return _json(shown_texts(to_plain(found)))

    @app.post("/api/compare")
    async def compare(wanted: ComparisonWanted) -> Response:
        return _json(to_plain(await _aside(lambda: session.compare(wanted.first, wanted.second))))

    @app.get("/answers/{name}.{kind}")
    async def answer(name: str, kind: str) -> Response:
        if kind not in FORMATS:
            return Response(status_code=404)
        body = await _aside(lambda: download(session.answer(name), kind))
        headers = {"content-disposition": f'attachment; filename="answer-{name[:8]}.{kind}"'}
        return Response(body, media_type=FORMATS[kind], headers=headers)


def _add_rows(app: FastAPI, session: Session) -> None:
    @app.get("/api/about")
    async def about() -> Response:
        return _json(to_plain(await _aside(session.about)))

    @app.post("/api/rows")
    async def rows(wanted: RowsWanted) -> Response:
        part = (wanted.where, wanted.words, wanted.order, wanted.offset, wanted.count)
        return _json(shown_page(await _aside(lambda: session.rows(*part))))

    @app.post("/api/outliers")
    async def outliers(wanted: RowsWanted) -> Response:
        part = (wanted.score, wanted.damping, wanted.where, wanted.offset, wanted.count)
        return _json(shown_page(await _aside(lambda: session.outliers(*part))))


async def _aside(job: Callable[[], _Found]) -> _Found:
    """Run a job in a thread of its own, which does not keep the server from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_Found] = loop.create_future()

    def tell(result: _Found | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result, error = job(), None
        except BaseException as raised:
            result, error = None, raised
        try:
            loop.call_soon_threadsafe(tell, result, error)
        except RuntimeError:  # the server has ended meanwhile
            return

    threading.Thread(target=run, daemon=True).start()
    return await done


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, GradsketchError)
    parts = {"came": error.came, "wanted": error.wanted, "fix": error.fix}
    return _json({"error": {name: one_line(str(part), _LONGEST) for name, part in parts.items()}}, status=400)


async def _misread(request: Request, error: Exception) -> Response:
    parts = {"came": "a request of another form", "wanted": "what the page sends", "fix": "Load the page again"}
    return _json({"error": parts}, status=error.status_code if isinstance(error, HTTPException) else 422)


async def _failed(request: Request, error: Exception) -> Response:
    came = one_line(f"{type(error).__name__}: {error}", _LONGEST)
    return _json({"error": {"came": came, "wanted": "", "fix": ""}}, status=500)


def _json(value: Any, status: int = 200) -> Response:
    return Response(as_json(value, indent=None), status_code=status, media_type="application/json")
