"""What a person can choose of an adaptation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from ..reference import checks

TRAINED_ON_TARGET_LABELS = ("feature-extraction", "top-layers", "finetune")
ALIGNING = ("coral", "dann")
METHODS = ("auto", "source-only", "reweight", "prototypes", *ALIGNING, *TRAINED_ON_TARGET_LABELS)
LEARNING_RATE = 0.1
BATCH_SIZE = 64


@dataclass(frozen=True)
class Settings:
    """How to adapt; :func:`fastda.adapting.adapt` says what each of them is."""

    method: str = "auto"
    epochs: int | None = None
    batch_size: int = BATCH_SIZE
    learning_rate: float = LEARNING_RATE
    seed: int = 0
    network: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        checks.option("method", self.method, METHODS)
        if self.epochs is not None:
            checks.whole_number("epochs", self.epochs, 1)
        checks.whole_number("batch_size", self.batch_size, 2)
        checks.number("learning_rate", self.learning_rate, above=0)
        checks.whole_number("seed", self.seed, 0)
        for name in ("network", "device"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}: expected a string or None, got {checks.describe(value)}; pass one")

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))
