"""The page at / in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser import CONTROL, ENTER, SPACE, TAB, Browser, browser, missing
from scipy.stats import kendalltau
from serving import serving

from qrank import Ranking, Reranker
from qrank.serve.request import Limits

pytestmark = pytest.mark.browser

QUERY = "which planet is red?"
TEXTS = ["bread is baked", "mars is the red planet", "venus is a planet", "red wine"]
SUBMIT = "[type=submit]"


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def mini() -> Iterator[Reranker]:
    with Reranker("mini") as found:
        yield found


@pytest.fixture(scope="module")
def others() -> Iterator[dict[str, Reranker]]:
    with (
        Reranker("mini", backend="fakes:length") as length,
        Reranker("mini", backend="fakes:ties") as ties,
    ):
        yield {"length": length, "ties": ties}


@pytest.fixture(scope="module")
def url(mini: Reranker) -> Iterator[str]:
    with serving({"mini": mini}, limits=Limits(documents=130)) as found:
        yield found


@pytest.fixture
def page(opened: Browser) -> Iterator[Browser]:
    """The browser; the console has to stay silent, and requests have to stay on this machine."""
    opened.resize(1280, 900)
    opened.prefer("light")
    opened.open("about:blank")
    opened.complaints()
    opened.hosts()
    yield opened
    assert not opened.complaints()
    assert all(host.startswith("127.0.0.1:") for host in opened.hosts())
    opened.script("[localStorage.clear(), sessionStorage.clear()]")


def rank(page: Browser, query: str = QUERY, texts: list[str] = TEXTS) -> None:
    page.paste("#query", query)
    page.paste("#documents", "\n".join(texts))
    page.one(SUBMIT).click()
    wait(page)


def wait(page: Browser) -> None:
    """Wait for a ranking."""
    page.wait(lambda: page.one("#status").text.startswith("Ranked"))


def alert(page: Browser) -> str:
    text: str = page.one("[role=alert]").text
    return text


def shown(rankings: list[Ranking]) -> list[str]:
    return [f"{each.score:.4f}" for each in rankings]


def test_it_ranks_like_the_library(page: Browser, url: str, mini: Reranker) -> None:
    page.open(url)
    # Markup is text, in documents as in anything else.
    texts = [*TEXTS, "<img src=x onerror=alert(1)> <b>mars</b>"]
    rank(page, texts=texts)
    expected = mini.rank(QUERY, texts)
    assert page.texts(".text") == [each.text for each in expected]
    assert page.texts(".score") == shown(expected)
    places = [(each.index, place) for place, each in enumerate(expected)]
    signs = ["=" if old == new else "▲▼"[new > old] + f" {abs(new - old)}" for old, new in places]
    assert [text.split(" from ")[0].split("\n")[0] for text in page.texts(".move")] == signs
    for text, (old, new) in zip(page.texts(".move"), places, strict=True):
        assert old == new or text.endswith(f"from {old + 1}")
    # With a logistic activation, the bar is the score.
    widths = page.script(
        "[...document.querySelectorAll('.bar')].map(bar =>"
        " parseFloat(getComputedStyle(bar, '::before').inlineSize) / bar.clientWidth)"
    )
    assert widths == pytest.approx([each.score for each in expected], abs=0.01)
    facts = page.one(".facts").text
    assert mini.target.name in facts
    assert " ms · " in facts
    assert " pairs/s" in facts
    assert page.one("#status").text.startswith("Ranked 5 documents with mini in ")


def test_the_sample_is_one_click(page: Browser, url: str) -> None:
    page.open(url)
    page.one("#sample").click()
    wait(page)
    assert page.texts(".text")[0].startswith("Plants make their own food by photosynthesis")
    assert page.one("#count").text == "6 documents"


def test_the_keyboard_is_enough(page: Browser, url: str) -> None:
    page.open(url)
    order = []
    for _ in range(8):
        page.press(TAB)
        order.append(page.focused())
        ring = "document.activeElement.matches('#file') ? document.activeElement.nextElementSibling"
        style = page.script(f"getComputedStyle({ring} : document.activeElement).outlineStyle")
        assert style == "solid", order
    assert order == ["theme", "query", "split", "documents", "file", "submit", "sample", "api"]
    page.write("#query", QUERY)
    page.write("#documents", "\n".join(TEXTS))
    page.press(CONTROL, ENTER)
    wait(page)
    assert len(page.all(".document")) == 4
    assert page.focused() == "documents"
    page.write("#query", "bread")
    page.press(ENTER)
    page.wait(lambda: page.texts(".text")[0] == TEXTS[0])
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter(field =>"
    assert page.script(f"{unnamed} !field.labels.length && !field.ariaLabel).length") == 0


SPLIT = [
    ("a\n\n", "auto", "1 document"),
    ("a\n b \nc", "auto", "3 documents"),
    ("a\nb\n \nc", "auto", "2 documents, split at blank lines"),
    ("a\nb\n\n\n\nc", "lines", "3 documents"),
    ("a\nb", "blocks", "1 document"),
    (" \n", "auto", "No documents yet"),
]


def test_documents_are_split(page: Browser, url: str) -> None:
    page.open(url)
    for text, way, count in SPLIT:
        page.one(f"#split option[value={way}]").click()
        page.paste("#documents", text)
        assert page.one("#count").text == count


FILES: list[tuple[str, bytes, list[str]]] = [
    ("a.txt", b"one\ntwo", ["one", "two"]),
    ("a.json", b'["one", {"text": "two\\n\\nthree", "title": "T"}]', ["one", "T two\n\nthree"]),
    ("a.jsonl", b'{"text": "one"}\n\n"two"\n', ["one", "two"]),
    ("a.csv", b'id,text\r\n1,"a ""b"", c\nd"\r\n2,e\r\n', ['a "b", c\nd', "e"]),
    ("b.CSV", "\ufeffTEXT;n\n\u00e9;1\n".encode(), ["\u00e9"]),
    ("c.csv", "n\ttext\n1\t\u00e9\n".encode("utf-16"), ["\u00e9"]),
]


def _is_named(page: Browser, name: str) -> bool:
    """Whether the page shows a file's name; of a .txt file it shows the text instead."""
    return name in (page.texts("#name") or ["a.txt"])


def _alerts(page: Browser, said: str) -> bool:
    return page.texts("[role=alert]")[0].startswith(said)


def test_a_file_is_chosen(page: Browser, url: str, tmp_path: Path) -> None:
    page.open(url)
    page.write("#query", QUERY)
    page.script("document.querySelector('#file').className = ''")  # to be found
    for name, content, texts in FILES:
        (tmp_path / name).write_bytes(content)
        page.one("#file").send_keys(str(tmp_path / name))
        page.wait(partial(_is_named, page, name))
        page.one(SUBMIT).click()
        wait(page)
        found = page.script("[...document.querySelectorAll('.text')].map(x => x.textContent)")
        assert sorted(found) == sorted(texts), name


def test_a_file_is_dropped_and_removed(page: Browser, url: str, tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text(json.dumps(TEXTS), "utf-8")
    page.open(url)
    page.write("#documents", "typed")
    page.drop(tmp_path / "more.json", "#documents")
    assert page.one("#name").text == "more.json"
    assert page.one("#count").text == "4 documents"
    assert not page.all("#documents")
    page.one("#unload").click()
    assert page.one("#count").text == "1 document"
    assert page.focused() == "documents"


UNREADABLE = [
    ("a.txt", b"\xff\x00\x01", "a.txt is not text in UTF-8"),
    ("a.json", b'{"text": "a"}', "a.json is not an array"),
    ("b.json", b"[1]", 'b.json, item 1: give a string, or an object with "text"'),
    ("a.jsonl", b'"a"\n{"text"\n', "a.jsonl, line 2 is not JSON"),
    ("a.csv", b"id,body\n1,a\n", 'a.csv has no column "text"; its columns are: id, body'),
]


def test_a_file_that_cannot_be_read(page: Browser, url: str, tmp_path: Path) -> None:
    page.open(url)
    for name, content, said in UNREADABLE:
        (tmp_path / name).write_bytes(content)
        page.drop(tmp_path / name, "#documents")
        page.wait(partial(_alerts, page, said))
        assert page.one("#count").text == "No documents yet"


def test_errors_are_in_the_servers_words(page: Browser, url: str) -> None:
    page.open(url)
    rank(page)
    page.paste("#documents", "a\n" * 131)
    page.one(SUBMIT).click()
    assert alert(page) == "131 documents; a request may have 130 (--max-documents)"
    # What is shown belongs to the query and the documents that are shown.
    assert not page.all(".document")
    page.write("#documents", "")
    page.one(SUBMIT).click()
    page.wait(lambda: alert(page) == "Add documents.")
    assert page.focused() == "documents"
    rank(page)
    assert not page.all("[role=alert]")


def test_a_server_that_is_gone(page: Browser, mini: Reranker) -> None:
    with serving({"mini": mini}) as url:
        page.open(url)
        rank(page)
    page.one(SUBMIT).click()
    assert alert(page).startswith("The server cannot be reached")


def test_a_key_is_asked_for_and_kept_in_the_tab_only(page: Browser, mini: Reranker) -> None:
    with serving({"mini": mini}, keys=(b"right",)) as url:
        page.open(url)
        assert alert(page) == "a key is needed: send the header Authorization: Bearer KEY"
        assert page.focused() == "key"
        page.write("#key", "wrong")
        page.press(ENTER)
        page.one("[role=alert]")
        page.write("#key", "right")
        page.press(ENTER)
        page.wait(lambda: not page.all("[role=alert]"))
        rank(page)
        assert len(page.all(".document")) == 4
        assert page.script("Object.values(sessionStorage)") == ["right"]
        assert page.script("localStorage.length") == 0
        assert page.script("document.cookie") == ""
        page.open(url)
        rank(page)
        assert not page.all("[role=alert]")


def test_models_side_by_side(page: Browser, mini: Reranker, others: dict[str, Reranker]) -> None:
    page.resize(1600, 900)
    models = {"mini": mini, **others}
    with serving(models) as url:
        page.open(url)
        rank(page)
        found = {name: model.rank(QUERY, TEXTS) for name, model in models.items()}
        assert page.texts("h2") == list(found)
        for number, rankings in enumerate(found.values(), 1):
            column = f"article:nth-child({number})"
            assert page.texts(f"{column} .text") == [each.text for each in rankings]
            assert page.texts(f"{column} .score") == shown(rankings)
        # The second column's moves are from the first's.
        first = [each.index for each in found["mini"]]
        for place, (each, text) in enumerate(
            zip(found["length"], page.texts("article:nth-child(2) .move"), strict=True)
        ):
            before = first.index(each.index)
            assert ("▲" in text, "▼" in text) == (before > place, before < place)
            assert text == "=" or text.endswith(f"from {before + 1}")
        scores: dict[str, Any] = {
            name: [each.score for each in sorted(rankings, key=lambda each: each.index)]
            for name, rankings in found.items()
        }
        tau = kendalltau(scores["mini"], scores["length"]).statistic
        said = page.texts("#agreement li")
        assert said[0].startswith(f"mini and length: Kendall’s τ {tau:.3f}; ")
        assert [line.partition(":")[0] for line in said[1:]] == ["mini and ties", "length and ties"]
        assert "τ undefined" in said[1]
        # Documents of the same rank share a line, and the one under the pointer is marked in all.
        tops = page.script("[...document.querySelectorAll('.document')].map(x => x.offsetTop)")
        assert tops[:4] == tops[4:8] == tops[8:]
        page.point("article:nth-child(2) .text")
        assert page.texts(".same .text") == [found["length"][0].text] * 3

        page.all("#models input")[0].click()
        page.all("#models input")[2].click()
        page.press(CONTROL, ENTER)
        page.wait(lambda: page.texts("h2") == ["length"])
        assert not page.all("#agreement")
        page.all("#models input")[1].click()
        page.one(SUBMIT).click()
        assert alert(page) == "Choose a model."


def test_long_texts_can_be_read(page: Browser, url: str) -> None:
    page.open(url)
    rank(page, texts=["mars " * 1_000, "bread"])
    (long,) = [text for text in page.all(".text") if text.text.startswith("mars")]
    height = long.size["height"]
    assert page.texts("span.more") == ["Too long: only its beginning was read"]
    page.one("button.more").click()
    assert long.size["height"] > 5 * height
    assert page.one("button.more").get_attribute("aria-expanded") == "true"
    page.one("button.more").click()
    assert long.size["height"] == height


def test_many_documents_are_shown_when_asked_for(page: Browser, url: str) -> None:
    page.open(url)
    rank(page, texts=[f"planet {number}" for number in range(101)])
    assert len(page.texts(".text")) == 100
    page.one("#rest").click()
    assert len({*page.texts(".text")}) == 101
    assert not page.all("#rest")


def test_dark_and_light(page: Browser, url: str) -> None:
    def dark() -> bool:
        ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
        return int(page.script(ground)) < 100

    page.open(url)
    assert not dark()
    page.prefer("dark")
    assert dark()
    page.wait(lambda: page.one("#theme").get_attribute("aria-pressed") == "true")
    page.one("#theme").click()
    assert not dark()
    page.open(url)
    assert not dark()
    page.press(TAB)
    page.press(SPACE)
    assert dark()


def test_a_phone(page: Browser, mini: Reranker, others: dict[str, Reranker]) -> None:
    page.resize(320, 640)
    with serving({"mini": mini, **others}) as url:
        page.open(url)
        overflow = "document.documentElement.scrollWidth - innerWidth"
        assert page.script(overflow) == 0
        rank(page, texts=[*TEXTS, "mars" * 100])
        page.wait(lambda: len(page.all("h2")) == 3)
        assert page.script(overflow) == 0
        assert page.script("innerWidth") == 320
        # One below the other, and the first is in view.
        lefts = page.script("[...document.querySelectorAll('article')].map(x => x.offsetLeft)")
        assert len(set(lefts)) == 1
        assert (
            0 <= page.script("document.querySelector('#status').getBoundingClientRect().top") < 320
        )


@pytest.mark.parametrize("path", ["/rank", "/rank/"])
def test_behind_a_proxys_prefix(page: Browser, mini: Reranker, path: str) -> None:
    with serving({"mini": mini}, root="/rank") as url:
        page.open(f"{url}{path}")
        rank(page)
        assert len(page.all(".document")) == 4
        asked = page.script("performance.getEntriesByType('resource').map(x => x.name)")
        assert {f"{url}/rank/{name}" for name in ("page.js", "page.css", "v1/rerank")} <= {*asked}
        assert all(name.startswith((f"{url}/rank/", "data:")) for name in asked)
