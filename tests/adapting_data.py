"""Small domains to adapt between, and the command in this process."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from fastda import cli

NAMES = ("ash", "birch", "cedar")
QUICK = ("--epochs", "25", "--batch-size", "30")


def clouds(count: int = 180, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features (count, 3) of three classes and their labels, and the same sheared: a third of these are mistaken."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    source, target = (np.eye(3)[labels] + 0.2 * random.normal(size=(count, 3)) for _ in "12")
    order = random.permutation(count)
    shear = np.array([[1, 2, 0], [0, 1, 0], [0, 0, 1.0]])
    return source.astype(np.float32), labels, (target @ shear)[order].astype(np.float32), labels[order]


def images(count: int = 90, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images (count, 1, 8, 8) of a bar, standing, lying or across; the target's are pale, on grey."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    shapes = np.zeros((3, 8, 8))
    shapes[0, :, 3:5], shapes[1, 3:5], shapes[2] = 1, 1, np.eye(8)
    source, target = (
        np.stack([np.roll(shapes[k], tuple(random.integers(-2, 3, size=2)), (0, 1)) for k in labels]) for _ in "12"
    )
    order = random.permutation(count)
    target = 0.45 + 0.2 * target[order]
    noise = [0.05 * random.normal(size=(count, 8, 8)) for _ in "12"]
    both = [(x + n)[:, None].astype(np.float32) for x, n in zip((source, target), noise)]
    return both[0], labels, both[1], labels[order]


def write_clouds(folder: Path) -> None:
    """source.npz with text labels, target.npz without, labelled.npz: the target with labels."""
    source, labels, target, target_labels = clouds()
    names = np.array(NAMES)
    np.savez(folder / "source.npz", features=source, labels=names[labels])
    np.savez(folder / "target.npz", features=target)
    np.savez(folder / "labelled.npz", features=target, labels=names[target_labels])


def call(*arguments: object) -> int:
    """`fastda` in this process."""
    return cli.main([str(argument) for argument in arguments])


def predictions(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def gain(folder: Path) -> tuple[float, float]:
    """Accuracy on the target before and after."""
    found = report(folder)
    return found["before"]["target_accuracy"]["share"], found["after"]["target_accuracy"]["share"]
