"""What each key has used, and whether it may use more: requests a minute, running ones, tokens and pictures a day."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.day_counts import Counts, DayCounts
from serving.errors import ApiError
from serving.keys import Key

MINUTE, DAY = 60.0, 86_400.0


@dataclass
class Usage:
    """Of one key. `began` are the times of its requests in the last minute, oldest first; the rest is of `day`."""

    began: deque[float] = field(default_factory=deque)
    running: int = 0
    day: int = 0
    tokens: int = 0
    pictures: int = 0


class Quotas:
    """Counts in memory, in the one thread of the event loop: nothing waits between a look and its note.

    Requests, running ones and pictures are never exceeded, however many come at once. Tokens are known when an answer
    ends, so a request that began below the limit is answered to its end. What was used today outlives the server where
    a file for it is given.
    """

    def __init__(self, clock: Callable[[], float] = time.time, kept: DayCounts | None = None) -> None:
        """`clock` gives seconds since 1970 in UTC. Raises KeyFileError where the file in `kept` cannot be read."""
        self._clock = clock
        self._kept = kept
        today = self._today()
        counts = kept.read(today) if kept is not None else {}
        self._usage = {
            name: Usage(day=today, tokens=used.tokens, pictures=used.pictures) for name, used in counts.items()
        }

    def enter(self, key: Key) -> None:
        """Count a request that begins. Raises ApiError (429, when to come back) where the key has used all it may."""
        usage, limits = self._now(key), key.limits
        if limits.running is not None and usage.running >= limits.running:
            raise _refused(f"{limits.running} requests of this key run already.", 1)
        if limits.tokens_a_day is not None and usage.tokens >= limits.tokens_a_day:
            raise _refused(f"This key has used its {limits.tokens_a_day:,} tokens of today.", self._rest_of_day())
        if limits.requests_a_minute is not None:
            if len(usage.began) >= limits.requests_a_minute:
                raise _refused(f"This key may ask {limits.requests_a_minute} times a minute.", self._wait(usage))
            usage.began.append(self._clock())
        usage.running += 1

    def leave(self, key: Key) -> None:
        """Count a request that ended."""
        self._now(key).running -= 1

    def take_pictures(self, key: Key, count: int) -> None:
        """Count pictures before they are looked at. Raises ApiError (429) where they are more than are left today."""
        usage, limit = self._now(key), key.limits.pictures_a_day
        if limit is not None and usage.pictures + count > limit:
            raise _refused(f"This key may send {limit:,} pictures a day.", self._rest_of_day())
        usage.pictures += count
        self._keep_when_due(key)

    def add_tokens(self, key: Key, count: int) -> None:
        """Count tokens that were read and written for the key."""
        self._now(key).tokens += count
        self._keep_when_due(key)

    def keep(self) -> None:
        """Write down what was used today, so that the next server begins with it."""
        if self._kept is not None:
            today = self._today()
            used = {name: usage for name, usage in self._usage.items() if usage.day == today}
            counts = {name: Counts(tokens=each.tokens, pictures=each.pictures) for name, each in used.items()}
            self._kept.write(today, counts)

    def _keep_when_due(self, key: Key) -> None:
        has_day = key.limits.tokens_a_day is not None or key.limits.pictures_a_day is not None
        if has_day and self._kept is not None and self._kept.is_due():
            self.keep()

    def headers(self, key: Key) -> dict[str, str]:
        """OpenAI's x-ratelimit headers, for the limits that the key has."""
        usage, limits = self._now(key), key.limits
        headers = {}
        if limits.requests_a_minute is not None:
            headers["x-ratelimit-limit-requests"] = str(limits.requests_a_minute)
            headers["x-ratelimit-remaining-requests"] = str(max(0, limits.requests_a_minute - len(usage.began)))
            headers["x-ratelimit-reset-requests"] = f"{self._wait(usage)}s"
        for name, limit, used in (
            ("tokens", limits.tokens_a_day, usage.tokens),
            ("pictures", limits.pictures_a_day, usage.pictures),
        ):
            if limit is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{name}"] = f"{self._rest_of_day()}s"
        return headers

    def _now(self, key: Key) -> Usage:
        """The key's usage without what is over."""
        usage = self._usage.setdefault(key.name, Usage())
        now = self._clock()
        while usage.began and usage.began[0] <= now - MINUTE:
            usage.began.popleft()
        if usage.day != (today := self._today()):
            usage.day, usage.tokens, usage.pictures = today, 0, 0
        return usage

    def _today(self) -> int:
        return int(self._clock() // DAY)

    def _wait(self, usage: Usage) -> int:
        """Seconds until the oldest request of this minute is over."""
        return math.ceil(max(0.0, usage.began[0] + MINUTE - self._clock())) if usage.began else 0

    def _rest_of_day(self) -> int:
        return math.ceil(DAY - self._clock() % DAY)


def _refused(message: str, seconds: int) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=max(1, seconds))
