"""Effects with intervals that hold for other seeds *and* other problems of the same kind.

Every run of a cell c and a seed s answers the same problems p. A contrast of cells is therefore
taken within seed and problem, and its variance has three parts (a two-way layout of crossed random
effects):

    Var = V_runs + V_problems - V_rest

- V_runs: of run means, the residual variance of the linear model `cell + seed` over *all* runs of
  the design (statsmodels' OLS): training noise is taken to be the same in every cell, which a few
  seeds could not tell apart;
- V_problems: of the contrast's means over seeds, from problem to problem;
- V_rest: of what is left in the contrast after seed and problem, which both of the above contain;
  the difference of the last two counts only where it is positive, as the variance of problems must
  be.

Degrees of freedom after Satterthwaite, as for any sum of independent mean squares.

Shapes: C cells, S seeds, P problems.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from unisd.study.design import check_installed

Values = NDArray[np.float64]
LEVEL = 0.95
ONE_RUN = "one run per cell: training noise is not in the interval"
NO_ANSWERS = "no single answers: holds for these problems only"


@dataclass(frozen=True)
class Estimate:
    """An effect with its 95 % interval and two-sided p-value.

    `low`, `high` and `p` are None where nothing can be said.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    se: float | None
    df: float | None
    note: str = ""

    @property
    def covers_zero(self) -> bool:
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def scaled(self, by: float) -> Estimate:
        """In other units (points for shares)."""
        numbers = {
            name: None if (v := getattr(self, name)) is None else v * by
            for name in ("value", "low", "high", "se")
        }
        return Estimate(**{**asdict(self), **numbers})


class Fit:
    """One outcome of all runs of a design.

    Args:
        runs_CS: run means `[C,S]`, NaN where a run is missing.
        answers_CSP: single answers `[C,S,P]` (their mean over P is `runs_CS`), NaN where a run is
            missing; or None.
    """

    def __init__(self, runs_CS: Values, answers_CSP: Values | None = None) -> None:
        check_installed()
        import statsmodels.api as sm

        self.runs_CS = runs_CS
        self.answers_CSP = answers_CSP
        C, S = runs_CS.shape
        cell_N, seed_N = np.nonzero(~np.isnan(runs_CS))
        X = np.zeros((len(cell_N), C + S - 1))
        X[np.arange(len(cell_N)), cell_N] = 1.0
        later = seed_N > 0
        X[np.arange(len(cell_N))[later], C + seed_N[later] - 1] = 1.0
        self._seen = np.any(X != 0, axis=0)  # a cell or seed without any run has no coefficient
        self._X = X[:, self._seen]
        with warnings.catch_warnings():
            # `contrast` asks what can be told
            warnings.filterwarnings("ignore", "The design matrix is rank-deficient")
            self._fit: Any = sm.OLS(runs_CS[cell_N, seed_N], self._X).fit() if len(cell_N) else None

    def contrast(self, weights_C: Values) -> Estimate | None:
        """The effect `sum_C weights * mean`; None where it cannot be estimated.

        A cell that it needs has no run, or the runs cannot tell it from a seed's.
        """
        C, S = self.runs_CS.shape
        used = weights_C != 0
        if self._fit is None or not np.all(self._seen[:C][used]):
            return None
        padded = np.concatenate([weights_C, np.zeros(S - 1)])[self._seen]
        if not np.allclose(np.linalg.pinv(self._X) @ self._X @ padded, padded, atol=1e-8):
            return None
        value = float(self._fit.params @ padded)
        value = 0.0 if abs(value) < 1e-12 else value  # rounding of equal means
        parts: list[tuple[float, float]] = []  # signed variances with their degrees of freedom
        notes = []
        if self._fit.df_resid >= 1:
            se = float(np.asarray(self._fit.t_test(padded).sd).squeeze())
            parts.append((se**2, float(self._fit.df_resid)))
        else:
            notes.append(ONE_RUN)
        if self.answers_CSP is None:
            notes.append(NO_ANSWERS)
        else:
            parts += self._problem_parts(weights_C, used, with_runs=bool(parts))
        if not parts:
            return Estimate(value, None, None, None, None, None, "; ".join(notes))
        count = 0 if self.answers_CSP is None else self.answers_CSP.shape[2]
        return _interval(value, parts, "; ".join(notes), count)

    def _problem_parts(
        self, weights_C: Values, used: NDArray[np.bool_], with_runs: bool
    ) -> list[tuple[float, float]]:
        """`V_problems` and, negative, `V_rest`, over the seeds that have all the cells."""
        assert self.answers_CSP is not None
        whole = ~np.isnan(self.runs_CS[used]).any(axis=0)
        S, P = int(whole.sum()), self.answers_CSP.shape[2]
        if S == 0 or P < 2:
            return []
        contrast_SP = np.einsum("c,csp->sp", weights_C[used], self.answers_CSP[used][:, whole])
        of_problem_P = contrast_SP.mean(axis=0)
        problems = float(of_problem_P.var(ddof=1)) / P
        if not with_runs:
            return [(problems, P - 1.0)]
        if S == 1:
            return [(problems, P - 1.0)]  # V_rest cannot be told from V_problems: a little too wide
        rest_SP = contrast_SP - contrast_SP.mean(axis=1, keepdims=True) - of_problem_P + contrast_SP.mean()
        df = (S - 1.0) * (P - 1.0)
        rest = float((rest_SP**2).sum()) / df / (S * P)
        return [(problems, P - 1.0), (-rest, df)]


def _interval(value: float, parts: list[tuple[float, float]], note: str, problems: int) -> Estimate:
    """The interval of an effect from the parts of its variance.

    `parts`: V_runs first; V_problems - V_rest counts only where it is positive, as a variance
    component must be.
    """
    first, others = parts[0], parts[1:]
    if sum(part for part, _ in others) <= 0:
        parts, others = [first], []
    variance = first[0] + sum(part for part, _ in others)
    if variance <= 1e-18:  # all alike: no answer differs between the cells
        # What none of P problems shows may still happen in up to 1 - 0.05^(1/P) of them (about
        # 3/P).
        half = 1 - (1 - LEVEL) ** (1 / problems) if problems else 0.0
        told = note or ("no answer differs" if value == 0 and problems else "no variation at all")
        p = max(0.0, 1 - abs(value)) ** problems if problems else 1.0 if value == 0 else None
        return Estimate(value, value - half, value + half, p, half / 2, None, told)
    df = variance**2 / sum(part**2 / df for part, df in parts)
    se = float(np.sqrt(variance))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, df)) * se
    p = float(2 * stats.t.sf(abs(value) / se, df))
    return Estimate(value, value - half, value + half, p, se, float(df), note)


def holm(p_values: list[float]) -> list[float]:
    """Adjust p-values for all questions asked at once (Holm).

    The chance of any false finding among them stays below 5 %.
    """
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []
