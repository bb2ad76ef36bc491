"""One web server for the tests of this folder, with only an image on it when a test starts."""

from collections.abc import Iterator

import pytest

from web import Site, png, running_site


@pytest.fixture(scope="session")
def server() -> Iterator[Site]:
    with running_site() as made:
        yield made


@pytest.fixture
def site(server: Site) -> Site:
    server.pages, server.seen = {"/a.png": png()}, []
    return server
