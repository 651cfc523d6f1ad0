"""Nobody reaches the page but who holds the token, from the page itself."""

import asyncio
import re

import pytest

from explorer import desk

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from gradsketch.explorer.guard import POLICY, place_of
from gradsketch.explorer.server import create_app

HOME = "http://127.0.0.1:8000"
PLACE = place_of(desk.TOKEN)
BODIES = {
    "api/ask": {"questions": [{"prompt": "the number 7", "answer": " squared"}], "k": 2},
    "api/colours": {"answer": "x"},
    "api/neighbours": {"row": 3},
    "api/sources": {"answer": "x", "column": "source"},
    "api/compare": {"first": ["x", 0], "second": ["x", 0]},
    "api/rows": {},
    "api/outliers": {"score": "dot"},
}
PAGES = ("", "page.css", "page.js", "report.css", "reading.js", "api/about", "answers/x.csv")
ROUTES = [("GET", path) for path in PAGES] + [("POST", path) for path in BODIES]
FORBIDDEN = {
    "no token": {"cookie": ""},
    "wrong token": {"cookie": f"gradsketch={desk.TOKEN[:-1]}x"},
    "empty token": {"cookie": "gradsketch="},
    "foreign host": {"host": "evil.example"},
    "rebound host": {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
    "host that begins alike": {"host": "127.0.0.1.evil.example"},
    "no host": {"host": ""},
    "foreign origin": {"origin": "https://evil.example"},
    "null origin": {"origin": "null"},
    "another port": {"origin": "http://127.0.0.1:9000"},
    "another scheme": {"origin": "https://127.0.0.1:8000"},
    "embedded elsewhere": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"},
    "from another port": {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"},
    "framed": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return create_app(desk.session(desk.stand_in(tmp_path_factory.mktemp("guard")), model=False), desk.TOKEN)


@pytest.fixture
def client(app):
    return TestClient(app, base_url=HOME, follow_redirects=False)


def send(client, method, path, **headers):
    given = {"host": "127.0.0.1:8000", "cookie": f"gradsketch={desk.TOKEN}", "origin": HOME} | headers
    body = {"json": BODIES[path]} if method == "POST" else {}
    return client.request(method, PLACE + path, headers={n: v for n, v in given.items() if v is not None}, **body)


def test_every_route_is_tried_here(app):
    there = {(method, route.path.lstrip("/")) for route in app.app.routes for method in route.methods - {"HEAD"}}
    tried = {(method, re.sub("answers/.*", "answers/{name}.{kind}", path).replace("", "")) for method, path in ROUTES}
    assert there - {("GET", "index.html")} == tried


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_the_page_itself_reaches_every_route(client, method, path):
    for origin in (HOME, None) if method == "GET" else (HOME,):
        assert send(client, method, path, origin=origin).status_code in (200, 400)  # 400: an answer that is not kept


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nobody_else_reaches_any(client, method, path):
    for name, headers in FORBIDDEN.items():
        answer = send(client, method, path, **headers)
        assert answer.status_code == 403, name
        assert "number" not in answer.text
    if method == "POST":
        assert send(client, method, path, origin=None).status_code == 403


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_refused(client, method):
    answer = client.request(method, PLACE, headers={"cookie": f"gradsketch={desk.TOKEN}", "origin": HOME})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_the_token_alone_does_not_open_other_places(client):
    headers = {"cookie": f"gradsketch={desk.TOKEN}"}
    for path in ("/", "/api/about", "/page.js", PLACE[:-1], f"{PLACE[:-2]}/", f"/x{PLACE}"):
        assert client.get(path, headers=headers).status_code == 403
    for path in ("..%2f..%2fetc%2fpasswd", "page", "docs", "openapi.json", "redoc", "index.html.bak"):
        assert client.get(PLACE + path, headers=headers).status_code == 404


def test_the_first_visit_trades_the_token_for_a_cookie(client):
    answer = client.get(f"/?token={desk.TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, PLACE)
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"gradsketch={desk.TOKEN}; ")
    assert {"HttpOnly", "SameSite=Strict", f"Path={PLACE}"} <= set(cookie.split("; "))
    assert desk.TOKEN not in PLACE
    assert client.get(PLACE).status_code == 200  # the client keeps cookies
    for wrong in ("", "x", desk.TOKEN[:-1], desk.TOKEN + "x", "é"):
        refused = client.get("/", params={"token": wrong})
        assert refused.status_code == 403
        assert "set-cookie" not in refused.headers
    assert client.get(f"/?token={desk.TOKEN}", headers={"host": "evil.example"}).status_code == 403


def test_every_answer_says_what_browsers_may_do_with_it(client):
    answers = [send(client, *route) for route in ROUTES]
    answers += [
        send(client, "GET", "", cookie=""),
        client.get(f"/?token={desk.TOKEN}"),
        send(client, "GET", "", host="x"),
    ]
    answers.append(client.get(f"{PLACE}nothing", headers={"cookie": f"gradsketch={desk.TOKEN}"}))
    for answer in answers:
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert desk.TOKEN not in answer.text
    assert "default-src 'none'" in POLICY
    assert "unsafe" not in POLICY


def test_a_forwarded_port_is_this_machine_too(client):
    for host in ("localhost:9000", "127.0.0.1:22022", "[::1]:7"):
        assert send(client, "POST", "api/rows", host=host, origin=f"http://{host}").status_code == 200


def test_bodies_are_bounded_and_of_the_page_form(client):
    assert client.post(f"{PLACE}api/rows", content=b" " * (2 << 20), headers=own()).status_code == 413
    chunked = client.post(f"{PLACE}api/rows", content=iter([b"{}"]), headers=own())
    assert chunked.status_code == 413
    for wrong in (b"", b"[1", b'{"where": 3}', b'{"offset": "<script>"}', b"[" * 5000):
        answer = client.post(f"{PLACE}api/rows", content=wrong, headers={**own(), "content-type": "application/json"})
        assert answer.status_code in (400, 422)
        assert answer.json()["error"]["fix"] == "Load the page again"
        assert "script" not in answer.text


def own():
    return {"cookie": f"gradsketch={desk.TOKEN}", "origin": HOME}


def test_errors_are_told_in_three_parts_and_failures_in_a_line(client, monkeypatch, app):
    answer = send(client, "POST", "api/colours")
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"came", "wanted", "fix"}

    def fails(*_):
        raise OSError("the disk\nis gone")

    monkeypatch.setattr("gradsketch.explorer.session.Session.rows", fails)
    loud = TestClient(app, base_url=HOME, raise_server_exceptions=False)
    failed = loud.post(f"{PLACE}api/rows", json={}, headers=own())
    assert failed.status_code == 500
    assert failed.json()["error"]["came"] == "OSError: the disk is gone"
    assert failed.headers["content-security-policy"] == POLICY


def test_a_web_socket_is_not_accepted(app):
    sent = []

    async def talk():
        async def send(message):
            sent.append(message)

        await app({"type": "websocket", "path": PLACE, "headers": []}, None, send)

    asyncio.run(talk())
    assert sent == []
