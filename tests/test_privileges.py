"""The smallest privileges with which the scripts can do all they can, and what is said with fewer.

The users are of Elasticsearch's file realm: the tests' distribution does not keep API keys.
"""

import re
from typing import Any

import pytest

from imagesearch.elasticsearch_errors import PRIVILEGES_HINT
from tests.pictures import Picture
from tests.running import Scripts, counts
from tests.server import FEWER, ROLES, ROOT, Server


@pytest.fixture
def as_role(server: Server) -> dict[str, Any]:
    """The environment of each role's user."""
    if not server.urls:
        pytest.skip("the server of TEST_ES_URL has no users of the tests' roles; that leaves privileges untested")
    return {role: {"ES_URL": url} for role, url in server.urls.items()}


def test_a_creator_can_do_all_that_create_can(
    as_role: dict[str, Any], elastic: Scripts, server: Server, picture: Picture
) -> None:
    creator, searcher = as_role["creator"], as_role["searcher"]
    first, second = picture("images/a.png"), picture("images/b.png")
    assert counts(elastic.create(**creator)) == {"new": 2}
    second.rename(second.with_name("c.png"))
    first.touch()
    assert counts(elastic.create("--prune", **creator)) == {"new": 1, "known": 1, "unchanged": 1, "deleted": 1}
    assert elastic.search(first, "-k", 2, "--html", "page.html", **searcher)[0]["hits"]["total"]["value"] == 2
    assert "no image of class Owl" in elastic.run("search.py", first, "--desc", "Owl", **searcher).stderr

    alias = f"{elastic.index}-alias"
    server.request("POST", "_aliases", {"actions": [{"add": {"index": elastic.index, "alias": alias}}]})
    elastic.index, index = alias, elastic.index
    picture("images/d.png")
    assert counts(elastic.create(**creator)) == {"new": 1, "unchanged": 2}
    assert elastic.search(first, **searcher)[0]["hits"]["hits"][0]["_index"] == index
    elastic.index = index


def test_with_fewer_privileges_the_message_names_those_that_are_missing(
    as_role: dict[str, Any], elastic: Scripts, picture: Picture
) -> None:
    path = picture("images/a.png")
    elastic.create()
    for arguments in (("create.py", "--model", "thumbnail"), ("search.py", path)):
        done = elastic.run(*arguments, **as_role["reader"])
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "denied access (HTTP 403)" in done.stderr and PRIVILEGES_HINT in done.stderr
    picture("images/b.png")
    stderr = elastic.create(code=2, **as_role["searcher"])
    assert "security_exception" in stderr and PRIVILEGES_HINT in stderr


@pytest.mark.parametrize("role", sorted(FEWER))
def test_each_of_the_privileges_is_needed(
    role: str, as_role: dict[str, Any], elastic: Scripts, picture: Picture
) -> None:
    path = picture("images/a.png")
    if role.startswith("creator"):
        done = elastic.run("create.py", "--model", "thumbnail", "--prune", **as_role[role])
    else:
        elastic.create()
        done = elastic.run("search.py", path, **as_role[role])
    assert done.returncode == 2, done.stderr
    assert PRIVILEGES_HINT in done.stderr


def test_messages_and_docs_name_just_these() -> None:
    page = (ROOT / "docs" / "elasticsearch.md").read_text()
    key = re.search(r'"privileges": \[([^]]*)\]', page)
    assert key
    assert re.findall(r'"(\w+)"', key[1]) == ROLES["creator"]
    for role, script in (("creator", "create.py"), ("searcher", "search.py")):
        *most, last = ROLES[role]
        assert f"{script} needs" in PRIVILEGES_HINT
        assert f"{', '.join(most)} and {last}" in PRIVILEGES_HINT
