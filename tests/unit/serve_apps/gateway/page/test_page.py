"""The page's files: who gets them, under which policy, and that nothing else became public."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from serve_apps.gateway.access.authentication import PUBLIC_PATHS
from serve_apps.gateway.page.files import PAGE_PATHS

STATIC = Path(__file__).parents[5] / "serve_apps/gateway/page/static"


def policy(answer: Any) -> dict[str, str]:
    parts = answer.headers["content-security-policy"].split(";")
    return dict(part.strip().partition(" ")[::2] for part in parts)


async def test_the_page_needs_no_key_and_nothing_else_became_public(gateway: Any) -> None:
    for path in PAGE_PATHS:
        answer = await gateway.client.get(path)
        assert answer.status_code == 200
        assert answer.content == (STATIC / (path.rpartition("/")[2] or "index.html")).read_bytes()
    assert {f"/static/{file.name}" for file in STATIC.iterdir()} - PAGE_PATHS == {
        "/static/index.html"
    }
    assert {"/v2/health/live", "/v2/health/ready"} == PUBLIC_PATHS - PAGE_PATHS


@pytest.mark.parametrize(
    "path",
    ["/static", "/static/", "/static/index.html", "/static/app.js/", "/static/../page.py",
     "/static/..%2fpage.py", "/static/%2e%2e/page.py", "/static//etc/passwd", "/static/app.js%00",
     "/index.html", "/v1/catalogue", "/v1/usage", "/metrics"],
)  # fmt: skip
async def test_no_other_path_is_answered_without_a_key(gateway: Any, path: str) -> None:
    assert (await gateway.client.get(path)).status_code == 401


async def test_no_path_leads_out_of_the_page(gateway: Any) -> None:
    for path in ("/static/../page.py", "/static/..%2fpage.py", "/static/%2e%2e/page.py"):
        answer = await gateway.client.get(path, headers=gateway.headers())
        assert answer.status_code == 404
        assert "error" in answer.json()


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
async def test_every_file_is_sent_under_the_strict_policy(gateway: Any, path: str) -> None:
    answer = await gateway.client.get(path)
    rules = policy(answer)
    assert rules["default-src"] == "'none'"
    for kind in ("script-src", "style-src", "connect-src"):
        assert rules[kind] == "'self'"
    for kind in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert rules[kind] == "'none'"
    assert not re.search("unsafe|http|\\*", answer.headers["content-security-policy"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert "set-cookie" not in answer.headers
    kinds = {"": "text/html", "html": "text/html", "js": "text/javascript", "css": "text/css",
             "svg": "image/svg+xml"}  # fmt: skip
    assert answer.headers["content-type"].startswith(kinds[path.rpartition(".")[2].strip("/")])


async def test_an_unchanged_file_is_not_sent_again(gateway: Any) -> None:
    first = await gateway.client.get("/static/app.js")
    etag = first.headers["etag"]
    for sent in (etag, f'"other", W/{etag}', "*"):
        again = await gateway.client.get("/static/app.js", headers={"if-none-match": sent})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
        assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    changed = await gateway.client.get("/static/app.js", headers={"if-none-match": '"other"'})
    assert changed.status_code == 200
    assert (await gateway.client.get("/static/style.css")).headers["etag"] != etag


def test_the_page_takes_nothing_from_elsewhere_and_turns_no_text_into_html() -> None:
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^/\s\"']+", text)) <= {
            "http://www.w3.org", "http://127.0.0.1:8000",
        }, file.name  # fmt: skip
        if file.suffix == ".js":
            for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "Storage",
                         "cookie", "indexedDB", "document.write"):  # fmt: skip
                assert word not in text, (file.name, word)
        if file.suffix == ".html":
            assert not re.search(r"\sstyle=|\son[a-z]+=|<style|<script(?![^>]*\ssrc=)", text)


def test_every_module_that_is_imported_is_there() -> None:
    for file in STATIC.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', file.read_text(encoding="utf-8")):
            assert f"/static/{name}" in PAGE_PATHS, (file.name, name)
