"""One normalisation for both databases: words in any script, genres, and what a search may cost."""

import threading
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

import books
import database
import postgresql
from main import app
from models import MAX_KEY_WORD, normalize, word_key
from settings import check_database_url, settings
from tests.fixtures import Person, url_of

# ruff: noqa: RUF001  # letters that look like others are what this is about
TITLES = {
    "Arabic with signs": "أَلْفُ لَيْلَةٍ وَلَيْلَةٌ",
    "Persian with a joiner": "کتاب‌خانه ملی",
    "Hebrew with points": "שִׁיר הַשִּׁירִים",
    "Syriac with points": "ܟܬܳܒܳܐ ܩܰܕܺܝܫܳܐ",
    "Hindi": "रामचरितमानस की हिन्दी कथा",
    "Bengali": "গীতাঞ্জলি কাব্য",
    "Gurmukhi": "ਗੁਰੂ ਗ੍ਰੰਥ ਸਾਹਿਬ",
    "Gujarati": "સત્યના પ્રયોગો",
    "Tamil": "திருக்குறள் உரை",
    "Telugu": "ఆంధ్ర మహాభారతం",
    "Kannada": "ಮಲೆಗಳಲ್ಲಿ ಮದುಮಗಳು",
    "Malayalam": "ചെമ്മീൻ നോവൽ",
    "Sinhala": "මඩොල් දූව",
    "Thai": "สี่แผ่นดิน เล่มหนึ่ง",
    "Lao": "ສັງສິນໄຊ ເຫຼັ້ມ",
    "Khmer": "ទុំទាវ រឿង",
    "Burmese": "မြန်မာ အဘိဓာန်",
    "Tibetan": "མི་ལ་རས་པ རྣམ་ཐར",
    "Georgian": "ვეფხისტყაოსანი პოემა",
    "Armenian with a ligature": "Դավիթ և Սասուն",
    "Greek with a final sigma": "Οδυσσέας και Πηνελόπη",
    "Greek with an iota below": "ᾠδή ᾳσμάτων",
    "Cyrillic": "Ёлка и звёзды",
    "German with a sharp s": "Straße nach Süden",
    "Turkish with a dot above": "İstanbul hatırası",
    "Turkish without a dot": "ısırgan otu",
    "ligatures": "ﬁnal ﬂight",
    "Vietnamese": "Truyện Kiều",
    "hiragana with sound marks": "がんばれ ぺんぎん",
    "katakana with sound marks": "ガラスの靴 ブドウ",
    "halfwidth katakana": "ﾊﾞﾗ ﾎﾟｽﾄ",
    "fullwidth letters": "ＡＢＣ 殺人事件",
    "Chinese": "紅樓夢 全集",
    "a variation selector": "葛\N{VARIATION SELECTOR-17}城 物語",
    "Korean": "채식주의자 소설",
    "Amharic": "ፍቅር እስከ መቃብር",
    "Cherokee": "ᏣᎳᎩ ᎪᏪᎵ",
    "Adlam": "𞤀𞤣𞤤𞤢𞤥 𞤆𞤵𞤤𞤢𞤪",
    "a soft hyphen": "Donau\N{SOFT HYPHEN}dampf Schiff",
    "letters of one word beyond the bound of PostgreSQL": "".join(map(chr, range(0x4E00, 0x4E00 + 490))),
}


def spellings(text: str) -> list[str]:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    return [text, text.upper(), text.lower(), text.title(), composed, decomposed]


def ids(client: Any, **query: str) -> list[int]:
    answer = client.get("/books", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.json()["total"] == len(answer.json()["items"])
    return [book["id"] for book in answer.json()["items"]]


@pytest.mark.slow
def test_titles_of_every_script_are_found(client: TestClient, reader: Person) -> None:
    """As they stand, in capitals and by their first word; as author, publisher, genre and language, too."""
    added, missed = {}, []
    for title in TITLES.values():
        added[title] = reader.add_book(
            title=title, author=title[:300], publisher=title[:300], genre=title[:100], language=title[:35]
        )["id"]
    for name, title in TITLES.items():
        words = [title.split()[0], title.split()[0].upper()]
        queries = [{"search": text} for text in (*words, *spellings(title))]
        queries += [{"search": text, "sort": "title"} for text in (words[1], title)]
        if len(title) <= 35:
            filters = ("author", "publisher", "genre", "language")
            queries += [{filter_name: text} for filter_name in filters for text in spellings(title)]
        missed += [(name, query) for query in queries if ids(client, **query) != [added[title]]]
    assert missed == []


@pytest.mark.slow
def test_normalization_is_the_same_in_every_case_and_form() -> None:
    """Of every character."""

    def forms(c: str) -> set[str]:
        cases = {c, c.upper(), c.lower(), c.title(), c.casefold(), normalize(c)}
        return {normalize(text) for text in (*cases, *(unicodedata.normalize("NFD", text) for text in cases))}

    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert [c for c in characters if len(forms(c)) != 1] == []


KEYS = {
    "punctuation": ("The Hitch-hiker's Guide: a trilogy (5)", "the hitch hiker s guide a trilogy 5"),
    "spaces": ("  a\t\u2003b\N{ZERO WIDTH SPACE}c_d ", "a b c d"),
    "only symbols": ("??? 😀 ❤\N{VARIATION SELECTOR-16}", ""),
    "a mark alone": ("\u0301", ""),
    "a bounded word": ("a" * MAX_KEY_WORD + "bc d", "a" * MAX_KEY_WORD + " bc d"),
}


@pytest.mark.parametrize(("text", "key"), KEYS.values(), ids=KEYS)
def test_keys_are_words_with_single_spaces(text: str, key: str) -> None:
    assert word_key(text) == word_key(key) == key


# --- bounds -------------------------------------------------------------------------------------------------------

SIXTEEN = " ".join("abcdefghijklmnop")
COUNTED = {
    "sixteen words": (SIXTEEN, True),
    "sixteen words and symbols": (f"{SIXTEEN} ??? -", True),
    "an ISBN with hyphens is one": (f"{SIXTEEN[:-2]} 978-0-441-17271-9", True),
    "seventeen words": (f"{SIXTEEN} q", False),
    "words within punctuation": (SIXTEEN.replace(" ", "-") + "-q", False),
}


@pytest.mark.parametrize("name", ["search", "author", "publisher"])
@pytest.mark.parametrize(("text", "allowed"), COUNTED.values(), ids=COUNTED)
def test_a_query_has_at_most_sixteen_words(client: TestClient, name: str, text: str, allowed: bool) -> None:
    for path in ("/books", "/books/export"):
        answer = client.get(path, params={name: text})
        assert answer.status_code == (200 if allowed else 422)
        assert allowed or answer.json()["detail"] == f"{name}: must have at most 16 words"


def count_to(connection: sa.Connection, most: int, *_: Any) -> int:
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {most}) SELECT max(i) FROM n"
    return int(connection.exec_driver_sql(numbers).scalar_one())


@pytest.mark.slow
def test_a_read_that_takes_too_long_is_503(client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (database, postgresql):
        monkeypatch.setattr(module, "MAX_READ_TIME", 0.2)
    monkeypatch.setattr(books, "best_matches", lambda connection, *_: count_to(connection, 10**9))
    if database.is_postgresql():
        database.backend().engine.dispose()  # the limit is that of new connections
    reader.add_book(title="Dune")
    for _ in range(3):
        answer = client.get("/books?search=dune")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert client.get("/books").json()["total"] == 1
    with pytest.raises(OperationalError):  # as a batch of an export
        database.read_sync(count_to, 10**9)
    assert database.read_sync(count_to, 1000) == 1000


THREADS = {
    "a letter": ({"search": "a"}, False),
    "two letters beside a word": ({"search": "dune me"}, False),
    "five words": ({"search": "alpha beta gamma delta epsilon"}, False),
    "five words of two parameters": ({"search": "alpha beta gamma", "author": "delta epsilon"}, False),
    "few long words": ({"search": "dune messiah"}, True),
    "no words": ({"genre": "novel"}, True),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("query", "on_the_loop"), THREADS.values(), ids=THREADS)
def test_costly_searches_do_not_block_the_event_loop(
    client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch, query: dict[str, str], on_the_loop: bool
) -> None:
    """FTS5 reads the lists of all words with a prefix in one step, which no budget interrupts."""
    reader.add_book(title="Dune Messiah: a, alpha, beta, gamma", author="Delta Epsilon", genre="novel")
    threads = []
    counted = books.BOOKS.total

    def total(*args: Any) -> int:
        threads.append(threading.current_thread())
        return counted(*args)

    monkeypatch.setattr(books.BOOKS, "total", total)
    assert client.portal is not None
    loop_thread = client.portal.call(threading.current_thread)
    for sort in ({}, {"sort": "title"}):
        assert client.get("/books", params=query | sort).status_code == 200
        assert {thread is loop_thread for thread in threads} == {on_the_loop}
        threads.clear()


def test_jobs_and_writers_may_take_longer(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (database, postgresql):
        monkeypatch.setattr(module, "MAX_READ_TIME", 0.001)
    if database.is_postgresql():  # its connections are made with the limit
        limited = postgresql.Postgresql(settings.database_url, database.to_json)
        monkeypatch.setattr(database.backend(), "engine", limited.engine)
    with pytest.raises(OperationalError):
        database.read_sync(count_to, 300_000)
    database.backend().engine.dispose()
    assert database.write_sync(lambda session: count_to(session.connection(), 300_000)) == 300_000


# --- genres -------------------------------------------------------------------------------------------------------


def test_the_list_of_genres_has_the_largest_and_finds_others(client: TestClient, admin: Person) -> None:
    rows = "".join(f"Book,{number},Genre {number:03}\n" for number in range(250))
    rows += "".join(f"Book,B{n},{genre}\n" for n, genre in enumerate(("Été", "ÉTÉ", "été", "C++", "C")))
    assert admin.upload(f"title,author,genre\n{rows}")["status"] == "completed"
    first = [("Été", 3), ("C", 1), ("C++", 1), *((f"Genre {number:03}", 1) for number in range(250))]
    found = {
        "": first[:200],
        "genre 24": [(f"Genre {number}", 1) for number in range(240, 250)],
        "ete": [("Été", 3)],
        "c+": [("C++", 1)],
        "none": [],
        "%": [],
    }
    for search, genres in found.items():
        answer = client.get("/books/genres", params={"search": search}).json()
        assert [(row["genre"], row["count"]) for row in answer] == genres, search
    assert client.get("/books/genres").json() == client.get("/books/genres?search=").json()
    for spelling in ("ETE", "Été", "e\u0301te\u0301"):
        assert client.get("/books", params={"genre": spelling}).json()["total"] == 3


FILL = """INSERT INTO book (title, author, title_key, author_key, genre, genre_key, copies, available, rating_count,
  rating_sum, version, created_at, updated_at)
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
SELECT 'T', 'A', 't', 'a', 'Genre ' || (100000 + i), 'genre ' || (100000 + i), 0, 0, 0, 0, 1, '2026', '2026' FROM n"""


@pytest.mark.sqlite
@pytest.mark.parametrize(("search", "thousands"), [(None, 10), ("genre 1012", 10), ("genre", 60)])
def test_genres_are_listed_without_reading_all(client: TestClient, search: str | None, thousands: int) -> None:
    database.write_sync(lambda session: session.execute(sa.text(FILL)))
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    def run(connection: sa.Connection) -> None:
        database._driver(connection).set_progress_handler(count, 1000)
        list_genres(connection, books.GenreQuery(search=search))

    list_genres: Any = books.list_genres.args[0]  # type: ignore[attr-defined]  # within the route's `partial`
    database.read_sync(run)
    assert steps < thousands, steps


# --- databases of the version before ------------------------------------------------------------------------------


def test_a_filled_database_is_normalized_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "database_url", check_database_url(url_of(tmp_path / "old.db")))
    moment = "2026-01-01 00:00:00"
    same = {"author": "Ann O'Nym", "title_key": "old", "author_key": "old", "publisher": "Straße", "version": 1}
    same |= dict.fromkeys(("copies", "available", "rating_count", "rating_sum"), 0)
    same |= dict.fromkeys(("created_at", "updated_at"), moment)
    titles = {"Été": "ete", "रामचरितमानस की कथा": "राम", "Οδυσσέας": "ΟΔΥΣΣΕΑΣ"}
    rows = [
        same | {"title": title, "genre": genre, "language": "FR", "isbn": isbn}
        for title, genre, isbn in zip(titles, ("Été", "ÉTÉ", None), ("9780441172719", None, None), strict=True)
    ]
    engine = sa.create_engine(settings.database_url)
    with engine.begin() as connection:
        command.upgrade(database._alembic(connection), "0010")
        columns, parameters = ", ".join(rows[0]), ", ".join(f":{name}" for name in rows[0])
        connection.execute(sa.text(f"INSERT INTO book ({columns}) VALUES ({parameters})"), rows)
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("INSERT INTO book_fts (book_fts) VALUES ('rebuild')")
    engine.dispose()
    database.migrate(settings.database_url)
    with TestClient(app) as client:
        for book_id, text in enumerate(titles.values(), 1):
            assert ids(client, search=text) == [book_id]
        assert ids(client, search="0441172717") == [1]
        assert ids(client, publisher="STRASSE") == ids(client, author="nym", language="fr") == [1, 2, 3]
        assert [book["id"] for book in client.get("/books?sort=title").json()["items"]] == [1, 3, 2]
        assert client.get("/books/genres").json() == [{"genre": "Été", "count": 2}]
        admin = Person(client, "admin", "admin")
        admin.patch("/books/1", json={"title": "Emma", "genre": "Novel"})
        assert admin.delete("/books/2").status_code == 204
        assert (ids(client, search="ete"), ids(client, search="emma"), ids(client, search="राम")) == ([], [1], [])
        assert client.get("/books/genres").json() == [{"genre": "Novel", "count": 1}]
        assert ids(client, genre="NOVEL") == [1]
        assert ids(client, language="fr") == [1, 3]
