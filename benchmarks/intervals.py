"""Coverage of the 95% intervals of gIoU by simulation: bootstrapped by picture, as we do, and by sentence.

  python benchmarks/intervals.py [--trials=1000] [--pictures=20,50,100,200] [--sentences=3] [--correlation=0.36]

A sentence is missed (IoU 0) with probability 0.3, and two sentences of one picture are missed together as the
correlation says; a mask that is found has an IoU between 0.7 and 1. The true mean is known, so each interval covers it
or does not. An interval that keeps its promise covers it in 95% of the trials.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from rsagent_jax.evals.metrics import bootstrap_ci

MISSED, FOUND = 0.3, (0.7, 1.0)  # share of sentences; IoU of a mask that is found
TRUTH = (1 - MISSED) * sum(FOUND) / 2


def draw(rng: np.random.Generator, images: int, sentences: int, correlation: float) -> np.ndarray:
    """IoU, f64[images, sentences]: a sentence shares its picture's fate with probability sqrt(correlation)."""
    shape = (images, sentences)
    shared = rng.random(shape) < correlation**0.5
    missed = np.where(shared, rng.random((images, 1)) < MISSED, rng.random(shape) < MISSED)
    return np.where(missed, 0.0, rng.uniform(*FOUND, shape))


def coverage(images: int, sentences: int, correlation: float, trials: int) -> tuple[float, float]:
    """Share of intervals that cover the truth: by picture, by sentence."""
    rng = np.random.default_rng(images)
    names = [str(i) for i in range(images) for _ in range(sentences)]
    covered = np.zeros(2)
    for seed in range(trials):
        ious = draw(rng, images, sentences, correlation).ravel()
        bounds = (bootstrap_ci(ious, of, seed=seed) for of in (names, None))
        covered += [low <= TRUTH <= high for low, high in bounds]
    by_image, by_sentence = (covered / trials).tolist()
    return by_image, by_sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--pictures", default="20,50,100,200")
    parser.add_argument("--sentences", type=int, default=3)
    parser.add_argument("--correlation", type=float, default=0.36)
    options = parser.parse_args()
    print(f"{options.sentences} sentences a picture, misses correlated {options.correlation}; nominal 0.95")
    print("pictures  by picture  by sentence")
    found = {}
    for images in map(int, options.pictures.split(",")):
        found[images] = coverage(images, options.sentences, options.correlation, options.trials)
        print(f"{images:8d}  {found[images][0]:10.3f}  {found[images][1]:11.3f}", flush=True)
    print(json.dumps({"coverage": {n: {"picture": a, "sentence": b} for n, (a, b) in found.items()}}))


if __name__ == "__main__":
    main()
