"""The page at /: static files, which use the server's own API."""

from __future__ import annotations

import hashlib
from html import escape
from importlib import resources

from fastapi import FastAPI, Request, Response

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Path -> file in `static` and its media type."""

HEADERS = {
    # Scripts cannot turn a string into markup, whoever wrote the string: no trusted types.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'self'; require-trusted-types-for 'script'; trusted-types 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # Ask each time whether it is still the same: the next version of qrank has another page.
    "cache-control": "no-cache",
    # Programs that do not ask for HTML get another answer at /.
    "vary": "accept",
}


def add_page(app: FastAPI, root: str) -> None:
    """Add the page's files to an application.

    Args:
        app: the application.
        root: the path under which a proxy serves the application, as `/rank`.
    """
    for path, (name, kind) in FILES.items():
        content = resources.files(__package__).joinpath("static", name).read_bytes()
        if root:
            # At /rank without a slash behind it, the page's relative addresses would begin at /.
            base = f'<base href="{escape(root)}/">'.encode()
            content = content.replace(b'<base href="./">', base)
        _add_file(app, path, content, kind)


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": tag}

    async def file(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    app.get(path, include_in_schema=False)(file)
