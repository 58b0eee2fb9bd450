"""What was spent, and is reserved, of budgets: the words that all stores share, and who opens one.

Amounts are whole numbers: tokens, or billionths of a currency's unit. So Python, Lua and SQLite
come to the same sums, and none of them rounds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from filters.stores.rules import WhenDown
from sidecar.api import Kit

if TYPE_CHECKING:
    from filters.stores.memory_spending import MemorySpending
    from filters.stores.redis_spending import RedisSpending

MOST = 2**53
"""Lua counts exactly up to here. Limits are far below, so that sums are, too."""
PANEL = "budget"


class Account(NamedTuple):
    """One sum: of what, for whom, in which period."""

    key: str
    """Says all three: `usd|day 2026-05-04|team=search`."""
    ends_at: int
    """From then on, in seconds since the Unix epoch, only calls that began before are settled."""


class Line(NamedTuple):
    """What calls may not cross."""

    account: int
    """A place among the accounts of a purse."""
    most: int
    """That is spent, reserved and asked for together."""


class Level(NamedTuple):
    """How an account stands."""

    spent: int
    reserved: int
    """For calls that are under way."""


class Crossed(NamedTuple):
    """Nothing was reserved."""

    line: int
    """The first line that it would cross: a place among the lines."""
    level: Level
    """How the account of that line stands."""


class Held(Protocol):
    """What was reserved of the accounts of a purse."""

    @property
    def totals(self) -> Sequence[int]:
        """What was spent and reserved of each account then, this included."""
        ...

    def settle(self, amounts: Sequence[int]) -> None:
        """So much was really spent of each. Only the first call counts; never raises."""


class Purse(Protocol):
    """The accounts that one kind of calls is counted in, together."""

    async def reserve(
        self, amounts: Sequence[int], lines: Sequence[Line], when_down: WhenDown
    ) -> Held | Crossed:
        """Reserve of each account its amount, or nothing if that would cross a line. A caller that
        is cancelled has reserved nothing. Never waits longer than 50 ms; while the store is away
        `when_down` holds, and with `closed` that is a `Rejected`."""
        ...

    async def levels(self) -> Sequence[Level]:
        """How the accounts stand."""
        ...


class Spending(Protocol):
    """Accounts, somewhere."""

    async def load(self) -> None:
        """Know what was spent before this process began. To be awaited before anything is
        reserved; a second time it does nothing."""
        ...

    def purse(self, accounts: Sequence[Account]) -> Purse:
        """What is reserved together, made out once for many calls: keep it for the period."""
        ...


def open_spending(kit: Kit) -> Spending:
    """The accounts of the shared store, of the file in the data directory, or of this process
    alone; the same for all filters, and through reloads. To be called in `start`.

    Raises OSError when the file cannot be used, RuntimeError when the package for the store is not
    installed.
    """
    return _memory(kit) if kit.store.url is None else _shared(kit)


def _memory(kit: Kit) -> MemorySpending:
    from filters.stores.memory_spending import SCHEMA, MemorySpending

    get = kit.resources.get
    if kit.data_dir is None:
        return get(("budgets", "memory"), lambda: MemorySpending(kit, None))
    # Only when there is a file: without one SQLite need not be loaded.
    from filters.stores.sqlite import open_database

    database = open_database(kit, "budgets.db", SCHEMA)  # for each snapshot: kept as long
    return get(("budgets", str(kit.data_dir)), lambda: MemorySpending(kit, database))


def _shared(kit: Kit) -> RedisSpending:
    # Only with such a store: the package for it need not be there without one.
    from filters.stores.redis import open_redis
    from filters.stores.redis_spending import RedisSpending

    redis = open_redis(kit)  # for each snapshot, so that it is kept as long as the accounts
    return kit.resources.get(("budgets", kit.store), lambda: RedisSpending(redis, kit))


Show = Callable[[], Awaitable[Sequence[Mapping[str, Any]]]]


class BudgetPanel:
    """The budgets on the admin port, as the filters of the live configuration show them."""

    def __init__(self) -> None:
        self._owners: dict[object, Show] = {}

    def shows(self, owner: object, show: Show) -> None:
        """A filter has started."""
        self._owners[owner] = show

    def forget(self, owner: object) -> None:
        """It has stopped. Idempotent."""
        self._owners.pop(owner, None)

    async def show(self) -> list[Mapping[str, Any]]:
        """Each budget of those who called in this period, with its period, what was spent and is
        reserved, and when it begins anew."""
        found: dict[tuple[str, ...], Mapping[str, Any]] = {}
        for show in list(self._owners.values()):  # around a reload the newest says it last
            for row in await show():
                found[row["team"], row["counted"], row["budget"], row["then"]] = row
        return [found[place] for place in sorted(found)]

    async def act(self, command: Mapping[str, Any]) -> Any:
        """There is nothing to do."""
        raise ValueError("budgets take no commands: change the limits in the configuration")
