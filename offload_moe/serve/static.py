"""The routes of the page's files."""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from offload_moe.serve.page import PAGE_HEADERS, PageFile, page_files


def page_routes() -> list[Route]:
    return [Route(path, _endpoint(file), methods=["GET"]) for path, file in page_files().items()]


def _endpoint(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    """A browser sends the tag of its copy each time, and receives a file again only where it has changed."""
    headers = {**PAGE_HEADERS, "ETag": file.etag, "Content-Type": file.content_type}

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers)

    return endpoint
