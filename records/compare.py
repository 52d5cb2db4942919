"""Says whether A scores better than B, how surely, and how many seeds it takes to say so.

    python records/compare.py runs/new runs/base                                one run each: the difference, no test
    python records/compare.py --a runs/new-* --b runs/base-*                    several seeds each
    python records/compare.py records/track_10min_16mb/2026-05-01_New 1.0810    a record against one published number
    python records/compare.py 42:1.0796,314:1.0802,999:1.0801 42:1.0808,314:1.0810,999:1.0812 --nats-per-bpb 2.5831
    python records/compare.py runs/new runs/base --score chunked                another evaluation than the final one

A and B are run folders, record folders, `submission.json`, `result.json`, or scores written down as SCORE,SCORE or SEED:SCORE,SEED:SCORE (bits per
byte; `--unit nats` for nats per token). `--a` and `--b` take several of them for one side.

Welch's test takes the seeds of A and B as independent; the paired test looks at the differences between runs of equal seed; where B is one number,
it is taken as exact and A is tested against it. The challenge takes a record that is better by more than 0.005 nats per token at p < 0.01
(one-sided): `--bar` and `--alpha`. Its maintainers' order of progress, p < 0.25 for being better at all, is `--bar 0 --alpha 0.25`.

Exit code 0: compared; 1: compared, but the runs did not score the same text in the same way, so that the numbers mean little; 2: not compared.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import report
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

# Nats per token and bits per byte of one data set keep one ratio; published scores are rounded to four or more decimals, which moves it by less.
RATIO_TOLERANCE = 2e-4
MOST_SEEDS = 1000
LEAST_ERROR = 1e-12  # a smaller standard error is rounding of equal differences, not spread
WRITTEN_SCORES = re.compile(r"(\d+:)?\d*\.?\d+([eE][-+]?\d+)?(,(\d+:)?\d*\.?\d+([eE][-+]?\d+)?)*")


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Scores
# Whatever A and B are given as becomes a sample: one score for each seed, in bits per byte, nats per token, or both.


class Score(NamedTuple):
    """One run's score. NaN where it is not known in that unit; no seed where none is known."""

    bpb: float
    nats: float  # per token
    seed: int | None
    source: str
    text_bytes: float = math.nan  # bytes of text that were scored
    evaluation: str = ""


@dataclass(frozen=True)
class Sample:
    """The scores of one side."""

    scores: tuple[Score, ...]
    notices: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Nats per token for each bit per byte; NaN where no score is known in both units."""
        ratios = [score.nats / score.bpb for score in self.scores if known(score.nats) and known(score.bpb)]
        return statistics.fmean(ratios) if ratios else math.nan

    def values(self, unit: str) -> list[float]:
        """Returns the scores in `unit`, "bpb" or "nats"; [] where some are not known in it."""
        values = [score.bpb if unit == "bpb" else score.nats for score in self.scores]
        return values if all(map(known, values)) else []


def known(value: float) -> bool:
    """Returns whether `value` is a number."""
    return not math.isnan(value)


def read_sample(items: Sequence[str], unit: str, evaluation: str | None) -> Sample:
    """Returns the scores of all `items` of one side. Raises ValueError or OSError saying which of them cannot be used, and why."""
    scores: list[Score] = []
    notices: list[str] = []
    for item in items:
        if Path(item).exists():
            found, more = read_path(Path(item), evaluation)
            scores += found
            notices += more
        elif WRITTEN_SCORES.fullmatch(item):
            scores += written_scores(item, unit)
        else:
            raise ValueError(f"{item}: no such file or folder; expected a run folder, a record folder, a .json file, or scores as 1.0800,1.0810")
    repeated = [source for source, times in Counter(score.source for score in scores if score.source).items() if times > 1]
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: given twice; a run counts once")
    for score in scores:
        if any(value <= 0 for value in (score.bpb, score.nats)):  # also keeps the ratio of the two finite
            raise ValueError(f"{score.source or 'a written score'}: a score of {min(score.bpb, score.nats)} is not possible; scores are above 0")
    return Sample(tuple(scores), tuple(notices))


def written_scores(text: str, unit: str) -> list[Score]:
    """Returns the scores in "1.0800,1.0810" or "42:1.0800,314:1.0810", taken as `unit`."""
    scores = []
    for entry in text.split(","):
        seed, colon, value = entry.rpartition(":")
        number = float(value)
        bpb, nats = (number, math.nan) if unit == "bpb" else (math.nan, number)
        scores.append(Score(bpb, nats, int(seed) if colon else None, ""))
    return scores


def read_path(path: Path, evaluation: str | None) -> tuple[list[Score], list[str]]:
    """Returns the scores in a run folder, a record folder or a .json file, and what a reader must know of them."""
    if path.is_dir():
        if (path / "run.jsonl").is_file():
            return read_run_folder(path, evaluation)
        for name in ("submission.json", "result.json"):
            if (path / name).is_file():
                return read_json(path / name, evaluation)
        raise ValueError(f"{path}: neither a run folder (run.jsonl) nor a record folder (submission.json)")
    return read_json(path, evaluation)


def read_run_folder(folder: Path, evaluation: str | None) -> tuple[list[Score], list[str]]:
    """Returns the final score of a run, or that of one of its evaluations."""
    run = report.read_run(folder)
    if not run.result:
        raise ValueError(f"{folder}: no result: {run.status}; finish it with: python train_gpt.py @{folder}/config.env RESUME=1")
    name = evaluation or str(run.settings.get("FINAL_EVAL", ""))
    score = result_score(run.result, evaluation, str(folder))
    text_bytes = report.number(run.evals.get(name), "bytes")
    return [score._replace(text_bytes=text_bytes, evaluation=name)], [f"{folder}: {notice}" for notice in run.notices]


def result_score(result: dict[str, Any], evaluation: str | None, source: str) -> Score:
    """Returns the score of a `result` event or `result.json`. Raises ValueError where it has none."""
    event = result
    if evaluation:
        evaluations = report.mapping(result, "scores")
        if evaluation not in evaluations:
            raise ValueError(f"{source}: no evaluation {evaluation}; it has: {', '.join(evaluations) or 'none'}")
        event = report.mapping(evaluations, evaluation)
    bpb, nats = report.number(event, "val_bpb"), report.number(event, "val_loss")
    if not known(bpb) and not known(nats):
        raise ValueError(f"{source}: no score (val_bpb or val_loss); was it evaluated? STAGES=eval ARTIFACT=… scores an artifact")
    seed = result.get("seed")
    return Score(bpb, nats, seed if isinstance(seed, int) else None, source)


def read_json(path: Path, evaluation: str | None) -> tuple[list[Score], list[str]]:
    """Returns the scores in a `submission.json` of the challenge or a `result.json` of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with val_bpb or seed_results")
    # Records write their seeds as `seed_results`, or as `seeds` where that is no plain list.
    by_seed = report.mapping(content, "seed_results") or report.mapping(content, "seeds")
    if not by_seed or evaluation:
        seeds = content.get("seeds")
        count = len(seeds) if isinstance(seeds, list) else 1
        notice = f"{path}: gives only the mean of {count} seeds; with the score of each of them it could be tested."
        return [result_score(content, evaluation, str(path))], [notice] * (count > 1)
    # Nats are often given for the mean only: they carry over to each seed, for their ratio to bits per byte is that of the data set.
    ratio = report.number(content, "val_loss") / report.number(content, "val_bpb") if report.number(content, "val_bpb") else math.nan
    scores = []
    for seed, result in by_seed.items():
        if not isinstance(result, dict) or not seed.isdecimal():
            raise ValueError(f"{path}: seed {seed}: expected an object with val_bpb under the number of each seed")
        score = result_score(result, None, f"{path}, seed {seed}")
        nats = score.nats if known(score.nats) else score.bpb * ratio
        scores.append(score._replace(seed=int(seed), nats=nats))
    return scores, []


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Tests
# Every test is one estimate: an improvement, its standard error and degrees of freedom. It is made in one unit; the other is a multiple of it.


class Estimate(NamedTuple):
    """By how much A is better than B (positive = lower score), in the unit of the scores."""

    test: str
    pairs: int  # runs of each side, or pairs; of A alone, where B is exact
    improvement: float
    error: float  # standard error of the improvement
    df: float
    spreads: tuple[float, float]  # standard deviations of what one more seed of A and of B adds; 0 = nothing

    def t(self, bar: float = 0.0) -> float:
        """Returns Student's t of the improvement beyond `bar`."""
        return (self.improvement - bar) / self.error

    def p(self, bar: float = 0.0) -> float:
        """Returns the one-sided p-value of A being better by more than `bar`."""
        return float(stats.t.sf(self.t(bar), self.df))

    def p_two_sided(self) -> float:
        """Returns the p-value of A and B being different."""
        return float(2 * stats.t.sf(abs(self.t()), self.df))

    def interval(self, confidence: float) -> tuple[float, float]:
        """Returns the two-sided confidence interval of the improvement."""
        half = float(stats.t.ppf((1 + confidence) / 2, self.df)) * self.error
        return self.improvement - half, self.improvement + half


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Returns Welch's estimate for independent samples of at least two scores each; degrees of freedom by Welch and Satterthwaite."""
    spreads = statistics.stdev(a), statistics.stdev(b)
    terms = spreads[0] ** 2 / len(a), spreads[1] ** 2 / len(b)
    below = terms[0] ** 2 / (len(a) - 1) + terms[1] ** 2 / (len(b) - 1)
    df = sum(terms) ** 2 / below if below else math.nan
    return Estimate("Welch", min(len(a), len(b)), statistics.fmean(b) - statistics.fmean(a), math.sqrt(sum(terms)), df, spreads)


def one_sample(differences: Sequence[float], test: str) -> Estimate:
    """Returns the estimate of the mean of at least two independent `differences`."""
    spread = statistics.stdev(differences)
    size = len(differences)
    return Estimate(test, size, statistics.fmean(differences), spread / math.sqrt(size), size - 1, (spread, 0.0))


def estimates(a: Sequence[float], b: Sequence[float], pairs: Sequence[tuple[float, float]]) -> tuple[list[Estimate], list[str]]:
    """Returns the tests that these scores allow, and for each that they do not, the reason."""
    found, missing = [], []
    if len(a) < 2:
        missing.append("A is one score, so its spread is unknown and nothing can be tested: run more seeds of it.")
    elif len(b) < 2:
        found.append(one_sample([b[0] - score for score in a], "one-sample"))
        missing.append("B is one score and is taken as exact; with several seeds of it, its own spread would count as well.")
    else:
        found.append(welch(a, b))
    if len(pairs) >= 2:
        found.append(one_sample([theirs - ours for ours, theirs in pairs], "paired"))
    elif len(a) >= 2 and len(b) >= 2:
        missing.append("No paired test: A and B have fewer than two seeds in common.")
    still = [estimate.test for estimate in found if estimate.error < LEAST_ERROR]
    if still:
        missing.append(f"No {' and no '.join(still)} test: the scores do not vary at all from seed to seed; are they rounded, or one run copied?")
    return [estimate for estimate in found if estimate.error >= LEAST_ERROR], missing


def paired_seeds(a: Sample, b: Sample) -> list[int]:
    """Returns the seeds that both have, each exactly once."""
    once = [{seed for seed, times in Counter(score.seed for score in sample.scores).items() if times == 1} for sample in (a, b)]
    return sorted(seed for seed in once[0] & once[1] if seed is not None)


def power(margin: float, spreads: tuple[float, float], seeds: int, alpha: float) -> float:
    """Returns how probable it is that a one-sided test at `alpha` shows a true `margin` beyond its bar, with `seeds` runs of each side.

    The noncentral t distribution: Cohen, Statistical Power Analysis for the Behavioral Sciences, chapter 2, with Welch's degrees of freedom.
    """
    variances = spreads[0] ** 2, spreads[1] ** 2
    df = (seeds - 1) * sum(variances) ** 2 / (variances[0] ** 2 + variances[1] ** 2)
    return float(stats.nct.sf(stats.t.isf(alpha, df), df, margin / math.sqrt(sum(variances) / seeds)))


def seeds_needed(margin: float, spreads: tuple[float, float], alpha: float, wanted: float) -> float:
    """Returns the least number of seeds of each side whose `power` is `wanted`; infinity where no number up to MOST_SEEDS is enough."""
    enough = (seeds for seeds in range(2, MOST_SEEDS + 1) if power(margin, spreads, seeds, alpha) >= wanted)
    return next(enough, math.inf) if margin > 0 else math.inf


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Comparison


class Options(NamedTuple):
    """What to test."""

    bar: float  # nats per token
    alpha: float
    confidence: float
    power: float
    effects: list[float]  # nats per token; [] = the improvement found


class Comparison(NamedTuple):
    """A against B. The tests are in `unit`; a factor of NaN means that the other unit is not known."""

    a: Sample
    b: Sample
    unit: str
    ratio: float  # nats per token for each bit per byte
    tests: list[Estimate]
    notices: list[str]
    obstacles: list[str]

    def factor(self, unit: str) -> float:
        """Returns what a number of this comparison is multiplied with to be in `unit`."""
        return 1.0 if unit == self.unit else 1 / self.ratio if unit == "bpb" else self.ratio


def compare(a: Sample, b: Sample, given_ratio: float = math.nan, same_tokens: bool = False) -> Comparison:
    """Returns the comparison, in nats per token where both sides have them on the same tokens, else in bits per byte. Raises ValueError.

    Tokens are the same where nats per bit per byte are, or where `same_tokens` says so.
    """
    notices = [*a.notices, *b.notices]
    ratios = [ratio for ratio in (b.ratio, a.ratio) if known(ratio)]
    ratio = ratios[0] if ratios else given_ratio
    same_tokens = same_tokens or len(ratios) < 2 or math.isclose(*ratios, rel_tol=RATIO_TOLERANCE)
    unit = next((unit for unit in (("nats", "bpb") if same_tokens else ("bpb",)) if a.values(unit) and b.values(unit)), "")
    if not unit:
        raise ValueError("one side is in nats per token, the other in bits per byte; give both in one unit (--unit)")
    if not same_tokens:
        notices.append(
            f"A's and B's tokens differ, or the bytes they stand for were counted differently ({a.ratio:.4f} and {b.ratio:.4f} nats per bit per byte)."
            " Compared in bits per byte; nats are of B's tokens. If the tokens are the same: --same-tokens compares in nats."
        )
    elif not known(ratio):
        other = "bits per byte" if unit == "nats" else "nats"
        notices.append(f"What the scores are in {other} is not known; give --nats-per-bpb (about 1.693 for sp1024, 2.583 for sp8192, 2.188 for CaseOps).")
    values = {id(sample): sample.values(unit) for sample in (a, b)}
    seeds = paired_seeds(a, b)
    by_seed = [{score.seed: value for score, value in zip(sample.scores, values[id(sample)], strict=True)} for sample in (a, b)]
    tests, missing = estimates(values[id(a)], values[id(b)], [(by_seed[0][seed], by_seed[1][seed]) for seed in seeds])
    left = max(len(a.scores), len(b.scores)) - len(seeds)
    if len(seeds) >= 2 and left:
        notices.append(f"Paired by the seeds that A and B have in common: {', '.join(map(str, seeds))}.")
    return Comparison(a, b, unit, ratio, tests, notices + missing, obstacles([*a.scores, *b.scores]))


def obstacles(scores: Iterable[Score]) -> list[str]:
    """Returns why scores of run folders must not be compared; none if they may be."""
    scores = list(scores)
    found = []
    sizes = sorted({score.text_bytes for score in scores if known(score.text_bytes)})
    names = sorted({score.evaluation for score in scores if score.evaluation})
    if len(sizes) > 1:
        found.append(f"The runs scored different amounts of text ({', '.join(f'{size:,.0f}' for size in sizes)} bytes): their scores must not be compared.")
    if len(names) > 1:
        found.append(f"The runs were scored by different evaluations ({', '.join(names)}); compare one that all of them have: --score chunked.")
    return found


def test_rows(comparison: Comparison, estimate: Estimate, options: Options) -> dict[str, Any]:
    """Returns the numbers of one test: what the table shows and what `--json` prints. None = not known."""
    low, high = estimate.interval(options.confidence)
    bpb, nats = comparison.factor("bpb"), comparison.factor("nats")
    bar = options.bar / nats if known(nats) else (0.0 if options.bar == 0 else math.nan)  # the unit does not matter to a bar of 0
    p_bar = estimate.p(bar) if known(bar) else None
    needed = []
    for effect in options.effects or [estimate.improvement * nats] * known(nats):
        better, more = (seeds_needed(effect / nats - least, estimate.spreads, options.alpha, options.power) for least in (0.0, bar))
        needed.append({"effect_nats": effect, "better": finite(better), "more_than_bar": finite(more)})
    return {
        "test": estimate.test, "n": estimate.pairs,
        "improvement_bpb": finite(estimate.improvement * bpb), "interval_bpb": [finite(low * bpb), finite(high * bpb)],
        "improvement_nats": finite(estimate.improvement * nats), "interval_nats": [finite(low * nats), finite(high * nats)],
        "t": estimate.t(), "df": estimate.df, "p_two_sided": estimate.p_two_sided(), "p_better": estimate.p(),
        "t_bar": estimate.t(bar) if known(bar) else None, "p_bar": p_bar, "passes": None if p_bar is None else p_bar < options.alpha,
        "seeds_needed": needed,
    }  # fmt: skip


def finite(value: float) -> float | None:
    """Returns `value`, or None where it is not finite, as JSON needs it."""
    return value if math.isfinite(value) else None


def sample_rows(comparison: Comparison, sample: Sample) -> dict[str, Any]:
    """Returns the numbers of one side, as `test_rows` does."""
    values = sample.values(comparison.unit)
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan
    row: dict[str, Any] = {"n": len(values), "seeds": [score.seed for score in sample.scores], "sources": [score.source for score in sample.scores]}
    for unit in ("bpb", "nats"):
        factor = comparison.factor(unit)
        own = sample.values(unit)  # where the tokens differ, each side's own nats are not B's
        row |= {f"mean_{unit}": finite(statistics.fmean(own) if own else mean * factor), f"std_{unit}": finite(spread * factor)}
        row[f"scores_{unit}"] = own or [finite(value * factor) for value in values]
    return row


def result(comparison: Comparison, options: Options) -> dict[str, Any]:
    """Returns everything that is printed, as one object for JSON."""
    return {
        "a": sample_rows(comparison, comparison.a), "b": sample_rows(comparison, comparison.b),
        "bar_nats": options.bar, "alpha": options.alpha, "confidence": options.confidence, "power": options.power,
        "tests": [test_rows(comparison, estimate, options) for estimate in comparison.tests],
        "notices": comparison.notices, "obstacles": comparison.obstacles,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Output


def decimals(value: float | None, digits: int = 5, sign: str = "") -> str:
    """Returns `value` with `digits` decimals, a dash for None."""
    return report.ABSENT if value is None else f"{value:{sign}.{digits}f}"


def p_text(p: float | None) -> str:
    """Returns a p-value with two significant digits."""
    return report.ABSENT if p is None else f"{p:.2g}"


def side_table(content: dict[str, Any], style: box.Box) -> Table:
    """Returns the table of means and scores."""
    table = Table("", "n", "mean bpb", "std", "nats per token", "std", "bpb by seed", box=style)
    for name in ("a", "b"):
        side = content[name]
        scores = side["scores_bpb"] if side["mean_bpb"] is not None else side["scores_nats"]
        listed = [f"{f'{seed}: ' if seed is not None else ''}{decimals(score)}" for seed, score in zip(side["seeds"], scores, strict=True)]
        means = (decimals(side[key]) for key in ("mean_bpb", "std_bpb", "mean_nats", "std_nats"))
        table.add_row(name.upper(), str(side["n"]), *means, ", ".join(listed))
    return table


def test_table(content: dict[str, Any], style: box.Box) -> Table:
    """Returns the table of tests, one column each."""
    tests, bar, alpha = content["tests"], content["bar_nats"], content["alpha"]
    names = {"Welch": "Welch", "paired": "paired, {n} seeds", "one-sample": "A against one number"}
    table = Table("", *(names[test["test"]].format(**test) for test in tests), box=style)

    def row(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *cells)

    for unit, label in (("bpb", "bpb"), ("nats", "nats per token")):
        row(f"A is better by, {label}", (decimals(test[f"improvement_{unit}"], sign="+") for test in tests))
        row(f"  {content['confidence']:.0%} interval", (" to ".join(decimals(end, sign="+") for end in test[f"interval_{unit}"]) for test in tests))
    row("t (degrees of freedom)", (f"{test['t']:.2f} ({test['df']:.2f})" for test in tests))
    row("p, A and B differ", (p_text(test["p_two_sided"]) for test in tests))
    row("p, A is better", (p_text(test["p_better"]) for test in tests))
    if bar:
        row(f"p, by more than {bar:g} nats (t)", (f"{p_text(test['p_bar'])} ({decimals(test['t_bar'], 2)})" for test in tests))
    row(f"  p < {alpha:g}", ({True: "yes", False: "no", None: report.ABSENT}[test["passes"]] for test in tests))
    for index in range(max((len(test["seeds_needed"]) for test in tests), default=0)):
        needed = [test["seeds_needed"][index] for test in tests]
        effects = {f"{need['effect_nats']:.4f}" for need in needed}
        effect = f"{effects.pop()} nats" if len(effects) == 1 else "the difference found"
        for key, what in (("better", "better"), ("more_than_bar", f"more than {bar:g}"))[: 2 if bar else 1]:
            row(f"seeds to show {effect}: {what}", (seeds_text(need[key], need["effect_nats"], bar if key != "better" else 0.0) for need in needed))
    return table


def seeds_text(seeds: int | None, effect: float, bar: float) -> str:
    """Returns the number of seeds, or why there is none."""
    if seeds is not None:
        return str(seeds)
    return f"over {MOST_SEEDS}" if effect > bar else "never: less than that" if effect > 0 else "never: A is not better"


def print_result(content: dict[str, Any], markdown: bool, console: Console) -> None:
    """Prints the comparison for people."""
    style = box.MARKDOWN if markdown else box.SIMPLE_HEAD
    console.print(side_table(content, style))
    if content["tests"]:
        console.print()
        console.print(test_table(content, style))
        console.print()
        chance = f"a one-sided test at p < {content['alpha']:g} shows it {content['power']:.0%} of the time"
        console.print(f"Seeds: how many of each side it takes until {chance}.", highlight=False)
    for notice in content["notices"]:
        console.print(notice, highlight=False, markup=False)
    for obstacle in content["obstacles"]:
        console.print(obstacle, style="bold red", highlight=False, markup=False)


def positive(text: str) -> float:
    """Returns a number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def share(text: str) -> float:
    """Returns a number between 0 and 1, for argparse."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number between 0 and 1")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line. Exits with code 2 where it is not valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", metavar="A B", help="two of: run folder, record folder, .json file, scores")
    parser.add_argument("--a", nargs="+", metavar="ITEM", help="several of these for A")
    parser.add_argument("--b", nargs="+", metavar="ITEM", help="several of these for B")
    parser.add_argument("--unit", choices=("bpb", "nats"), default="bpb", help="unit of scores that are written down (default: bpb)")
    parser.add_argument("--nats-per-bpb", type=positive, default=math.nan, metavar="RATIO", help="val_loss / val_bpb, where the scores do not tell")
    parser.add_argument("--same-tokens", action="store_true", help="A and B have one tokenizer, though they count bytes differently: compare in nats")
    parser.add_argument("--score", metavar="NAME", help="evaluation to compare, such as chunked (default: each run's final one)")
    parser.add_argument("--bar", type=float, default=0.005, metavar="NATS", help="how much better a record has to be, nats per token (default: 0.005)")
    parser.add_argument("--alpha", type=share, default=0.01, help="and at which p-value (default: 0.01)")
    parser.add_argument("--confidence", type=share, default=0.95, help="of the intervals (default: 0.95)")
    parser.add_argument("--effect", type=positive, nargs="+", default=[], metavar="NATS", help="true differences to plan seeds for (default: the one found)")
    parser.add_argument("--power", type=share, default=0.8, help="probability with which these seeds show it (default: 0.8)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--markdown", action="store_true", help="tables for a README")
    output.add_argument("--json", action="store_true", help="the same numbers, for programs")
    options = parser.parse_args(arguments)
    if len(options.sides) == 2 and not options.a and not options.b:
        options.a, options.b = [options.sides[0]], [options.sides[1]]
    elif options.sides or not options.a or not options.b:
        parser.error("give A and B, or --a ITEM... --b ITEM...")
    if not 0 <= options.bar < math.inf:
        parser.error(f"--bar {options.bar}: expected 0 or more nats")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, after printing the comparison."""
    given = parse(arguments)
    try:
        a, b = (read_sample(items, given.unit, given.score) for items in (given.a, given.b))
        comparison = compare(a, b, given.nats_per_bpb, given.same_tokens)
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    content = result(comparison, Options(given.bar, given.alpha, given.confidence, given.power, given.effect))
    if given.json:
        print(json.dumps(content, indent=1))
    else:
        print_result(content, given.markdown, Console(width=None if sys.stdout.isatty() else 160))
    return 1 if comparison.obstacles else 0


if __name__ == "__main__":
    sys.exit(main())
