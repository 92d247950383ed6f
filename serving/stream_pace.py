"""Say how many tokens an event of a streamed answer carries: one where they come slowly, some where they come fast."""

SECONDS_AN_EVENT = 0.125  # eight events a second still flow, and each costs both servers what a whole token costs
MOST_TOKENS = 16
ENOUGH_TOKENS = 8  # of an answer, to tell a pace by
NEWEST = 0.3  # weight of the newest answer


class StreamPace:
    """How fast each of the answers that are being written has come lately."""

    def __init__(self) -> None:
        self._seconds_a_token: float | None = None

    def note(self, tokens: int, seconds: float) -> None:
        """An answer took so long from its first token to its last."""
        if tokens < ENOUGH_TOKENS:
            return
        newest = seconds / tokens
        before = newest if self._seconds_a_token is None else self._seconds_a_token
        self._seconds_a_token = before + NEWEST * (newest - before)

    def tokens_an_event(self) -> int:
        """For the next answer; its first token comes alone, and at once."""
        if self._seconds_a_token is None:
            return 1
        fitting = round(SECONDS_AN_EVENT / max(self._seconds_a_token, SECONDS_AN_EVENT / MOST_TOKENS))
        return max(1, fitting)
