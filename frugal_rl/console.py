"""What a person sees of a run, on standard error: a live table on a terminal, a line a step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

BARS = "▁▂▃▄▅▆▇█"
HISTORY = 60  # steps in the small curve


class Console(AbstractContextManager["Console"]):
    """Reports a run of `steps` steps, `parameters` entries. Use as a context manager."""

    def __init__(self, steps: int, title: str) -> None:
        self.steps, self.title = steps, title
        self.rewards: list[float] = []
        self.step_s: list[float] = []
        self.live: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console as RichConsole
            from rich.live import Live

            self.live = Live(console=RichConsole(stderr=True), refresh_per_second=4)
            self.live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, trace)
            self.live = None

    def say(self, text: str) -> None:
        """One line that stays on the screen."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, row: Mapping[str, Any]) -> None:
        """The metrics of a step that is done."""
        self.rewards.append(row["reward"])
        self.step_s.append(row["seconds"])
        if self.live is not None:
            self.live.update(self._table(row))
        else:
            self.say(self._line(row))

    def _left(self, step: int) -> str:
        recent = self.step_s[-10:]
        return duration((self.steps - step) * sum(recent) / len(recent))

    def _line(self, row: Mapping[str, Any]) -> str:
        groups, step = row["groups"], row["step"]
        return (
            f"step {step}/{self.steps}  reward {row['reward']:.3f}  "
            f"no signal {groups - row['signal_groups']}/{groups}  "
            f"length {row['response_tokens']:.1f}  truncated {row['truncated']:.1%}  "
            f"norm {number(row['gradient_norm'])}  "
            f"changed {row['changed_any']:,} (>1e-5: {row['changed_1e5']:,})  "
            f"{row['tokens_per_s']:,.0f} tok/s  peak {size(row['peak_memory_bytes'])}  "
            f"left {self._left(step)}"
        )

    def _table(self, row: Mapping[str, Any]) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        groups, step = row["groups"], row["step"]
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(self.title, style="bold"),
            f"step {step}/{self.steps}",
            ProgressBar(total=self.steps, completed=step, width=30),
            f"{self._left(step)} left",
        )
        body = Table.grid(padding=(0, 3))
        cells = {
            "reward": f"{row['reward']:.3f}",
            "groups without signal": f"{groups - row['signal_groups']} of {groups}",
            "response length": f"{row['response_tokens']:.1f} (longest {row['longest_tokens']})",
            "truncated": f"{row['truncated']:.1%}",
            "gradient norm": number(row["gradient_norm"]),
            "changed entries": f"{row['changed_any']:,} in any bit, {row['changed_1e5']:,} by > 1e-5",
            "speed": f"{row['tokens_per_s']:,.0f} tokens/s, {row['seconds']:.2f} s a step",
            "peak memory": size(row["peak_memory_bytes"]),
        }
        for name, value in cells.items():
            body.add_row(Text(name, style="dim"), value)
        return Group(head, Text(curve(self.rewards[-HISTORY:]), style="green"), body)


def curve(values: list[float]) -> str:
    """Values from 0 to 1 as a line of bars; more than 1 is drawn as 1."""
    top = len(BARS) - 1
    return "reward " + "".join(BARS[round(min(max(v, 0.0), 1.0) * top)] for v in values)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def size(count_bytes: int) -> str:
    """Bytes as GiB, MiB or KiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count_bytes >= scale:
            return f"{count_bytes / scale:.1f} {unit}"
    return f"{count_bytes} bytes"


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
