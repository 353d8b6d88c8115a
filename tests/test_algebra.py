"""algebra.py: equal is equal in value, and out of memory or stack is not unequal."""

from __future__ import annotations

import pytest

from frugal_rl.rewards import algebra


@pytest.mark.parametrize("kind", [MemoryError, RecursionError])
def test_running_out_inside_math_verify_is_not_swallowed(kind: type[Exception]) -> None:
    def runs_out() -> None:
        raise kind

    guarded = algebra._guarded(runs_out)
    with pytest.raises(algebra.Exhausted, match=kind.__name__):
        try:
            guarded()
        except Exception:  # noqa: BLE001 - as math-verify does
            raise AssertionError("swallowed") from None


def test_what_a_guarded_function_handles_itself_stays_its_own() -> None:
    def runs_out() -> None:
        raise RecursionError

    inner = algebra._guarded(runs_out)

    def handles() -> str:
        try:
            inner()
        except RecursionError:
            return "handled"
        return "not raised"

    assert algebra._guarded(handles)() == "handled"
    with pytest.raises(algebra.Exhausted):  # the count of open calls is back at none
        inner()


def test_exhaustion_reaches_the_pool_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(*_: object) -> None:
        raise algebra.Exhausted("RecursionError: too deep")

    monkeypatch.setattr(algebra, "compare", runs_out)
    with pytest.raises(MemoryError, match="too deep"):
        algebra.sympy_equal({"gold": "x", "answer": "y", "identical": True})


def test_a_difference_in_the_hundredth_digit_is_a_difference() -> None:
    def equal(gold: str, answer: str) -> bool:
        return (
            algebra.sympy_equal({"gold": gold, "answer": answer, "identical": True})["verdict"] == "CORRECT"
        )

    assert equal(r"\sqrt{2}", r"\frac{2}{\sqrt{2}}")
    assert not equal(r"\sqrt{2}", r"\sqrt{2}+10^{-100}")
    assert not equal("e^{-20}", "e^{-21}")
