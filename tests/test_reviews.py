"""Reviews of a book, and their removal by staff."""

import pytest
from fastapi.testclient import TestClient

from tests.fixtures import Clock, Person


@pytest.fixture
def book(reader: Person, other_reader: Person) -> int:
    """A book with reviews by Rita and Oskar."""
    book = int(reader.add_book()["id"])
    for person, rating in ((reader, 1), (other_reader, 4)):
        person.post(f"/my-library/{book}")
        review = {"status": "completed", "rating": rating, "review": "Buy my book!", "tags": ["mine"]}
        assert person.patch(f"/my-library/{book}", json=review).status_code == 200
    return book


def test_staff_can_remove_a_review(
    client: TestClient, clock: Clock, reader: Person, librarian: Person, book: int
) -> None:
    before, version = reader.get(f"/my-library/{book}").json(), client.get(f"/books/{book}").json()["version"]
    clock.advance(minutes=1)
    start = client.get("/events?limit=100").json()["next"]
    assert librarian.delete(f"/books/{book}/reviews/RITA").status_code == 204, "case does not matter"
    assert [review["username"] for review in client.get(f"/books/{book}/reviews").json()["items"]] == ["Oskar"]
    shown = client.get(f"/books/{book}").json()
    assert (shown["rating"], shown["rating_count"], shown["version"]) == (4.0, 1, version + 1)
    after = reader.get(f"/my-library/{book}").json()
    assert (after["rating"], after["review"]) == (None, None)
    unchanged = ("status", "tags", "started_at", "finished_at", "added_at")
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    public = client.get("/events", params={"after": start}).json()["items"]
    assert [(event["type"], event["data"]["username"], event["data"]["book_rating"]) for event in public] == [
        ("review.deleted", "Rita", 4.0)
    ]
    mine = reader.get("/events", params={"after": start}).json()["items"]
    assert [event["type"] for event in mine] == ["shelf.updated", "review.deleted"]
    assert mine[0]["data"].items() >= {"book_id": book, "status": "completed", "rating": None}.items()


def test_a_rating_alone_and_a_text_alone_can_be_removed(client: TestClient, reader: Person, librarian: Person) -> None:
    for change in ({"rating": 5}, {"review": "Hm."}):
        book = reader.add_book()["id"]
        reader.post(f"/my-library/{book}", json={"status": "abandoned"})
        reader.patch(f"/my-library/{book}", json=change)
        assert librarian.delete(f"/books/{book}/reviews/Rita").status_code == 204
        assert client.get(f"/books/{book}/reviews").json()["total"] == 0
        assert client.get(f"/books/{book}").json()["rating_count"] == 0
        reader.patch(f"/my-library/{book}", json={"rating": 2})
        assert client.get(f"/books/{book}").json()["rating"] == 2.0, "the reader can rate it again"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        pytest.param("/books/999/reviews/Rita", 404, id="unknown book"),
        pytest.param("/books/{book}/reviews/Lydia", 404, id="entry without review"),
        pytest.param("/books/{book}/reviews/nobody", 404, id="unknown user"),
        pytest.param("/books/{book}/reviews/%00%ff", 422, id="invalid username"),
    ],
)
def test_removing_a_missing_review_is_refused(
    client: TestClient, librarian: Person, book: int, path: str, status: int
) -> None:
    librarian.post(f"/my-library/{book}")
    assert librarian.delete(path.format(book=book)).status_code == status
    assert client.get(f"/books/{book}/reviews").json()["total"] == 2


def test_readers_can_remove_only_their_own_review(reader: Person, other_reader: Person, book: int) -> None:
    for person in (reader, other_reader):
        assert person.delete(f"/books/{book}/reviews/Rita").status_code == 403
    assert reader.patch(f"/my-library/{book}", json={"rating": None, "review": None}).status_code == 200


def test_a_removed_review_is_404(librarian: Person, book: int) -> None:
    answers = [librarian.delete(f"/books/{book}/reviews/Oskar").status_code for _ in range(2)]
    assert answers == [204, 404]
