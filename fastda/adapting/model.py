"""An adapted model: from samples to probabilities of named classes, saved as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import check_writable, write_atomically
from ..nn.modes import evaluating
from ..nn.outputs import as_tensor
from ..training.distributed import as_device
from ..version import __version__
from .networks import ROWS, Scale, make_network
from .prototypes import Prototypes

FORMAT = 1
METADATA = "fastda"


@dataclass(eq=False)
class AdaptedModel:
    """A classifier with all that its use needs.

    Attributes:
        scale: what is done to the inputs first.
        feature_extractor, label_predictor: the network.
        log_weights: (C,), added to the logits: the logarithms of the classes' weights, 0 unless frequencies changed.
        classes: their names, in the order of the logits.
        shape: of a sample: (D,) or (C, H, W).
        method: how it was adapted.
        network: "package.module:function" that makes the network; None for the default one.
        feature_names: of the columns of the table that it was made from; () for arrays and images.
    """

    scale: Scale
    feature_extractor: nn.Module
    label_predictor: nn.Module
    log_weights: Tensor
    classes: tuple
    shape: tuple[int, ...]
    method: str
    network: str | None = None
    feature_names: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> AdaptedModel:
        """Move the network; inputs may be anywhere."""
        device = as_device(device)
        self.feature_extractor.to(device)
        self.label_predictor.to(device)
        self.log_weights = self.log_weights.to(device)
        return self

    @torch.no_grad()
    def features(self, inputs: Tensor, *, scaled: bool = False) -> Tensor:
        """(N, F) features before the label predictor, on the CPU."""
        with evaluating(self.feature_extractor):
            return torch.cat([self._features(chunk, scaled).cpu() for chunk in _chunks(inputs)])

    @torch.no_grad()
    def logits(self, inputs: Tensor, *, scaled: bool = False) -> Tensor:
        """(N, C), float32, on the CPU.

        Args:
            inputs: (N, *shape).
            scaled: whether `scale` has been applied already.
        """
        self.check(inputs)
        parts = []
        with evaluating(self.feature_extractor), evaluating(self.label_predictor):
            for chunk in _chunks(inputs):
                logits = as_tensor("network", self.label_predictor(self._features(chunk, scaled)))
                parts.append((logits.float() + self.log_weights).cpu())
        return torch.cat(parts)

    def predict_proba(self, inputs: Tensor) -> Tensor:
        """(N, C) probabilities of the classes, float64."""
        return self.logits(inputs).double().softmax(1)

    def predict(self, inputs: Tensor) -> list:
        """The name of the most probable class of each sample."""
        return [self.classes[index] for index in self.logits(inputs).argmax(1).tolist()]

    def check(self, inputs: Tensor, name: str = "inputs") -> None:
        """Raise a ValueError for samples of another shape than the model's."""
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(
                f"{name}: expected samples of shape {self.shape}, {_in_words(self.shape)}, which the model was made "
                f"for, got {tuple(inputs.shape[1:])}; {_what_to_do(self.shape)}"
            )

    def _features(self, chunk: Tensor, scaled: bool) -> Tensor:
        chunk = chunk if scaled else self.scale(chunk)
        return as_tensor("network", self.feature_extractor(chunk.to(self.log_weights.device)))

    # Files

    def save(self, path: str | os.PathLike) -> Path:
        """Write tensors and metadata as safetensors, whole or not at all."""
        safetensors = require_safetensors("save")
        path = Path(path)
        check_writable("path", path)
        tensors = {"scale.mean": self.scale.mean, "scale.deviation": self.scale.deviation}
        tensors["log_weights"] = self.log_weights
        for part in ("feature_extractor", "label_predictor"):
            tensors |= {f"{part}.{name}": value for name, value in getattr(self, part).state_dict().items()}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        metadata = {
            "format": FORMAT,
            "version": __version__,
            "classes": list(self.classes),
            "shape": list(self.shape),
            "method": self.method,
            "network": self.network,
            "feature_names": list(self.feature_names),
            "prototypes": isinstance(self.label_predictor, Prototypes),
        }
        data = safetensors.save(tensors, {METADATA: json.dumps(metadata, ensure_ascii=False)})
        write_atomically(path, lambda file: file.write(data))
        return path


def load_model(path: str | os.PathLike, *, network: str | None = None) -> AdaptedModel:
    """Read what :meth:`AdaptedModel.save` wrote, onto the CPU. Nothing is unpickled, and no code that the file names is
    run.

    Args:
        path: the file, or the folder that `fastda adapt` wrote it to.
        network: "package.module:function", which has to be said again for a network of your own.

    Raises:
        ValueError: another file; another network than it was made with.
        FileNotFoundError: none.

    Example:
        >>> import tempfile, torch
        >>> from fastda.adapting import adapt, load_model
        >>> labels = torch.arange(120) % 2
        >>> source = torch.randn(120, 3) / 4 + torch.stack([labels, -labels, labels], 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = adapt(source, labels, 2 * source, method="coral", epochs=20, out=folder, classes=["no", "yes"])
        ...     model = load_model(folder)
        >>> model.predict(torch.tensor([[2.0, -2.0, 2.0]]))
        ['yes']
    """
    require_safetensors("load_model")
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a model that fastda adapt wrote, got no such file; name another")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a model that fastda adapt wrote, got a file that is no safetensors ({error}); "
            "name another"
        ) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a model that fastda adapt wrote, of format {FORMAT}, got another; name another file"
        )
    made_by = metadata["network"]
    if made_by != network:
        raise ValueError(
            f"{path}: expected network={made_by!r}, which the model was made with, got {network!r}; "
            + (f"pass --network {made_by} if you trust that code" if made_by else "leave it out")
        )
    shape, classes = tuple(metadata["shape"]), tuple(metadata["classes"])
    extractor, predictor = make_network(shape, len(classes), network)
    if metadata["prototypes"]:
        predictor = Prototypes.like(tensors["label_predictor.prototypes"])
    for name, part in (("feature_extractor", extractor), ("label_predictor", predictor)):
        own = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        try:
            part.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"{path}: expected the weights of its own network, got others ({error})") from error
    scale = Scale(tensors["scale.mean"], tensors["scale.deviation"])
    return AdaptedModel(
        scale,
        extractor,
        predictor,
        tensors["log_weights"],
        classes,
        shape,
        metadata["method"],
        made_by,
        tuple(metadata["feature_names"]),
    )


def require_safetensors(who: str):
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who} needs safetensors, which is not installed: pip install 'fastda-kernels[adapt]'", name="safetensors"
        ) from error
    return safetensors.torch


def _chunks(inputs: Tensor) -> Iterator[Tensor]:
    """At least one, so that no samples have features and logits too."""
    return iter(inputs.split(ROWS))


def _in_words(shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return f"{shape[0]} features"
    return f"images of {shape[0]} channels and {shape[1]}×{shape[2]} pixels"


def _what_to_do(shape: tuple[int, ...]) -> str:
    """With samples of another shape."""
    if len(shape) == 1:
        return "take the same features"
    return "resize the images" + (f" (--image-size {shape[1]})" if shape[1] == shape[2] else "")
