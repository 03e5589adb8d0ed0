"""Build and query time, disk and memory of WebShop's search on a generated catalogue.

`python -m benchmarks.webshop_search [--products N] [--json FILE]`. The catalogue is the same in every run: documents of
about 100 words, with the word frequencies of product texts (Zipf's law without its head, the stop words). A query has
4 to 12 words drawn with the same frequencies. One process builds the index, then several open it at the same time.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import record
from env_servers.arguments import positive
from env_servers.webshop.search.index import SearchIndex, build
from env_servers.webshop.search.storage import size_of

FULL_CATALOGUE = 1_180_000
VOCABULARY = 1_000_000
WORDS = 100
HEAD = 10
"""First ranks of Zipf's law, which are left out. Without them the most frequent words are in 40 % of the documents."""
QUERY_WORDS = (4, 12)
FREQUENT = 10
BATCH = 1000
MIB = 1024 * 1024

Figures = dict[str, float]


class Language:
    """Words in order of their frequency, and random draws of them."""

    def __init__(self) -> None:
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        self.words = [_spell(rank, syllables) for rank in range(VOCABULARY)]
        frequencies = 1 / np.arange(1 + HEAD, 1 + HEAD + VOCABULARY)
        self._cumulated = np.cumsum(frequencies) / frequencies.sum()

    def text(self, rng: np.random.Generator, count: int) -> str:
        """Return `count` random words."""
        return " ".join(map(self.words.__getitem__, self.draw(rng, count)))

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Return the ranks of `count` random words."""
        ranks: list[int] = self._cumulated.searchsorted(rng.random(count)).tolist()
        return ranks


def _spell(rank: int, syllables: list[str]) -> str:
    """Return a word of at least two syllables, different for each rank."""
    rank, last = divmod(rank + len(syllables), len(syllables))
    return (_spell(rank - len(syllables), syllables) if rank >= len(syllables) else syllables[rank]) + syllables[last]


def documents(products: int) -> Iterator[tuple[str, str]]:
    """Yield the catalogue as pairs of ASIN and text, ASINs in random order."""
    rng = np.random.default_rng(0)
    language = Language()
    numbers = rng.permutation(products)
    for first in range(0, products, BATCH):
        lengths = rng.poisson(WORDS, size=min(BATCH, products - first))
        drawn = iter(language.draw(rng, int(lengths.sum())))
        for place, length in enumerate(lengths):
            words = [language.words[next(drawn)] for _ in range(length)]
            yield f"B{numbers[first + place]:09}", " ".join(words)


def queries(count: int) -> list[str]:
    """Return queries with the word frequencies of the catalogue."""
    rng = np.random.default_rng(1)
    language = Language()
    least, most = QUERY_WORDS
    return [language.text(rng, int(rng.integers(least, most + 1))) for _ in range(count)]


class Timed:
    """Passes documents on and measures the time to generate them, which is not part of a build."""

    def __init__(self, source: Iterable[tuple[str, str]]) -> None:
        self._source = iter(source)
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        while batch := self._next_batch():
            yield from batch

    def _next_batch(self) -> list[tuple[str, str]]:
        began, cpu_began = time.perf_counter(), time.process_time()
        batch = list(islice(self._source, BATCH))
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu_began
        return batch


def measure_build(folder: Path, products: int) -> Figures:
    """Build the index in this process. The peak memory includes mapped pages of the files."""
    catalogue = Timed(documents(products))
    began, cpu_began = time.perf_counter(), time.process_time()
    build(catalogue, folder)
    return {
        "build_s": time.perf_counter() - began - catalogue.seconds,
        "build_cpu_s": time.process_time() - cpu_began - catalogue.cpu_seconds,
        "build_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "index_mib": size_of(folder) / MIB,
    }


def measure_queries(folder: Path, count: int) -> Figures:
    """Open the index in this process and search. Memory is the increase: private, and mapped pages of the index."""
    asked = queries(count)
    frequent = " ".join(Language().words[:FREQUENT])
    process = psutil.Process()
    before = process.memory_info()
    began = time.perf_counter()
    index = SearchIndex.open(folder)
    opened = time.perf_counter() - began
    index.search(frequent)
    spent = [_milliseconds(index, query) for query in asked]
    worst = [_milliseconds(index, frequent) for _ in range(20)]
    after = process.memory_info()
    return {
        "open_s": opened,
        "query_mean_ms": statistics.fmean(spent),
        "query_p95_ms": float(np.percentile(spent, 95)),
        "query_max_ms": max(spent),
        "frequent_query_ms": statistics.median(worst),
        "own_mib": ((after.rss - after.shared) - (before.rss - before.shared)) / MIB,
        "mapped_mib": (after.shared - before.shared) / MIB,
    }


def _milliseconds(index: SearchIndex, query: str) -> float:
    began = time.perf_counter()
    index.search(query)
    return 1000 * (time.perf_counter() - began)


def measure_workers(folder: Path, workers: int, count: int) -> Figures:
    """Return means of `measure_queries` over several concurrent processes."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        answers = list(pool.map(measure_queries, [folder] * workers, [count] * workers))
    return {key: statistics.fmean(answer[key] for answer in answers) for key in answers[0]}


def measure(products: int, count: int, workers: int) -> dict[str, object]:
    """Return all figures and a description of the machine."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "index"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            built = pool.submit(measure_build, folder, products).result()
        alone = measure_workers(folder, 1, count)
        together = measure_workers(folder, workers, count)
    return {
        "machine": record.machine(),
        "products": products,
        "workers": workers,
        "build": built,
        "alone": alone,
        "together": together,
    }


def show(figures: Mapping[str, object], console: Console) -> None:
    """Print the figures as tables."""
    built, alone, together = (record.section(figures, key) for key in ("build", "alone", "together"))
    table = Table(title=f"WebShop search index of {figures['products']:,} products", show_header=False)
    table.add_row("build, one core", f"{built['build_s']:,.0f} s")
    table.add_row("processor time of the build", f"{built['build_cpu_s']:,.0f} s")
    table.add_row("peak memory of the build, mapped files included", f"{built['build_peak_mib']:,.0f} MiB")
    table.add_row("size on disk", f"{built['index_mib']:,.0f} MiB")
    console.print(table)
    searches = Table(title="Searches for 50 products")
    for heading in ("", "one process", f"{figures['workers']} at once, each"):
        searches.add_column(heading, justify="right" if heading else "left")
    for label, key, unit in (
        ("open and check", "open_s", "s"),
        ("query, mean", "query_mean_ms", "ms"),
        ("query, 95th percentile", "query_p95_ms", "ms"),
        ("query, slowest", "query_max_ms", "ms"),
        (f"query of the {FREQUENT} most frequent words", "frequent_query_ms", "ms"),
        ("private memory", "own_mib", "MiB"),
        ("mapped pages, shared by all", "mapped_mib", "MiB"),
    ):
        searches.add_row(label, f"{alone[key]:,.1f} {unit}", f"{together[key]:,.1f} {unit}")
    console.print(searches)


def main() -> None:
    parser = record.parser("Measure WebShop's search on a generated catalogue.")
    parser.add_argument("--products", type=positive, default=FULL_CATALOGUE, help="documents in the catalogue")
    parser.add_argument("--queries", type=positive, default=500, help="searches that are timed in each process")
    parser.add_argument("--workers", type=positive, default=4, help="processes that share the index")
    options = parser.parse_args()
    figures = measure(options.products, options.queries, options.workers)
    show(figures, Console())
    record.keep(figures, options.json)


if __name__ == "__main__":
    main()
