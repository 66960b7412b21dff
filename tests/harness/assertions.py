"""Assertions that several tests share."""


def assert_contains(text: str, *fragments: object) -> None:
    """Assert that a text contains all fragments, converted to strings."""
    for fragment in fragments:
        assert str(fragment) in text, (str(fragment), text)
