"""What the sidecars' own ledgers hold when a drill is over."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from drill.plan import label_of

FOLDER = "state"
"""Beside a sidecar's configuration, as its `data_dir` says."""

_READ = """SELECT team, model, SUM(calls), SUM(input_tokens), SUM(output_tokens),
    SUM(reported_input_tokens), SUM(reported_output_tokens) FROM calls GROUP BY team, model"""


@dataclass(slots=True)
class Accounts:
    """The records of all sidecars together.

    Tokens are by team or by label of the model, and `input` or `output`.
    """

    calls: int = 0
    used: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Reported, or estimated where nobody did."""
    reported: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By the providers."""

    def add(
        self, team: str, model: str, calls: int, used: tuple[int, int], reported: tuple[int, int]
    ) -> None:
        """Enter calls of one team and model, with their tokens of input and output."""
        self.calls += calls
        for name in (team, label_of(model)):
            for kind, tokens, told in zip(("input", "output"), used, reported, strict=True):
                self.used[name, kind] += tokens
                self.reported[name, kind] += told


def read_accounts(folders: Iterable[Path]) -> Accounts:
    """From the ledgers of sidecars that have stopped, one beside each configuration."""
    accounts = Accounts()
    for folder in folders:
        with closing(sqlite3.connect(folder / FOLDER / "ledger.db")) as ledger:
            for team, model, calls, *tokens in ledger.execute(_READ):
                accounts.add(team, model, calls, (tokens[0], tokens[1]), (tokens[2], tokens[3]))
    return accounts
