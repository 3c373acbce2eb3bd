"""What happens to a record that is no text: the run stops, or the record is left out and counted."""

from collections import Counter

from data.errors import DataError

# The kinds that are counted: bytes that are no UTF-8; a line that is no JSON; JSON that is no object; a
# record without the text key; a value that is no text; half a surrogate pair; no conversation to learn from;
# one that its template refuses.
KINDS = ("utf8", "json", "no_object", "no_key", "no_text", "surrogate", "conversation", "template")


class BadRecords:
    """The policy of `data.on_bad_record`, and how many of each kind it left out."""

    def __init__(self, policy: str = "stop"):
        self.policy = policy
        self.counts: Counter[str] = Counter()

    def found(self, kind: str, message: str) -> None:
        """Count one record. Raises DataError with `message` where the policy is to stop."""
        assert kind in KINDS
        if self.policy == "stop":
            raise DataError(f"{message}, or leave such records out with data.on_bad_record=skip")
        self.counts[kind] += 1


def in_words(counts: dict[str, int]) -> str:
    """Return the counts as in `3 utf8, 1 json`."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
