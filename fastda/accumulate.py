"""Mean and covariance of data that does not fit: taken a chunk at a time, on several processes, or both."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .ops import covariance
from .reference import checks
from .reference.coral import SCALES, distance_of_moments
from .reference.distributed import check_group
from .reference.reduction import REDUCTIONS, reduce

ROWS = 4096  # of a chunk are converted at a time, so that a memory-mapped chunk may be larger than memory


class CovarianceAccumulator:
    r"""Mean and covariance of samples that come in chunks, as exact as in one pass over all of them.

    Counts n, means μ and centred sums of products S of two parts a and b are merged by

    .. math::
        \delta = \mu_b - \mu_a, \quad
        \mu = \mu_a + \tfrac{n_b}{n_a + n_b} \delta, \quad
        S = S_a + S_b + \tfrac{n_a n_b}{n_a + n_b} \delta \delta^T

    in which nothing cancels, so that features far from zero lose no digits: in float64 the result is that of one pass
    to 1e-12, whatever the chunks and the order in which they are merged. Memory: D² values for each batch, however
    many samples come. A chunk of N samples costs N·D² operations, and D² more to merge it: large chunks are cheaper.

    Args:
        dtype: in which the moments are taken and kept: float64, or float32, which is faster where double precision is
            slow and exact to about 1e-6.
        device: where they are taken and kept, and where chunks are brought; by default the device of the first chunk.

    Raises:
        TypeError: `dtype` is another one.

    Not differentiable: no graph is kept of the chunks, whatever they require. NaN and Inf in a feature leave none of
    its moments finite. An accumulator can be pickled and copied; :meth:`state_dict` is for `torch.save`, and is read
    with `weights_only=True`.

    Source: Chan, Golub & LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, Stanford
    University, STAN-CS-79-773, 1979; Algorithms for computing the sample variance, The American Statistician 37(3),
    1983.

    Example:
        >>> import torch, fastda
        >>> features = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
        >>> accumulator = fastda.CovarianceAccumulator()
        >>> accumulator.update(features[:1]).update(features[1:])
        CovarianceAccumulator(count=3, num_features=2, dtype=torch.float64, device='cpu')
        >>> accumulator.mean
        tensor([3., 3.], dtype=torch.float64)
        >>> accumulator.covariance()
        tensor([[ 4., -1.],
                [-1.,  7.]], dtype=torch.float64)
    """

    def __init__(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise TypeError(f"dtype: expected torch.float64 or torch.float32, got {checks.describe(dtype)}; choose one")
        self.dtype = dtype
        self._given_device = None if device is None else torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget all samples, and of which shape they were."""
        self._count = 0
        self._mean: Tensor | None = None  # (..., D)
        self._scatter: Tensor | None = None  # (..., D, D), the sum of (x − μ)(x − μ)ᵀ

    @property
    def count(self) -> int:
        """How many samples there were, in each batch."""
        return self._count

    @property
    def device(self) -> torch.device | None:
        """Where the moments are; None as long as no chunk has come and none was chosen."""
        return self._given_device if self._mean is None else self._mean.device

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, of shape `(..., D)`. A ValueError if there were none."""
        self._check_count("mean", 1, "1 sample")
        return self._mean.clone()

    def covariance(self, *, correction: int = 1) -> Tensor:
        """Covariance of the samples, of shape `(..., D, D)`, as :func:`fastda.covariance` of all of them in one tensor.

        Args:
            correction: 1 for the unbiased estimate, 0 for the population's.

        Raises:
            ValueError: there were fewer than `correction + 1` samples.
        """
        return self._covariance("covariance", correction)

    @torch.inference_mode(False)  # a state made under inference mode could not be updated outside of it
    @torch.no_grad()
    def update(self, chunk: Tensor) -> CovarianceAccumulator:
        """Take in more samples.

        Args:
            chunk: features of shape `(..., N, D)`, float32, float64, bfloat16 or float16, on any device; N may differ
                from chunk to chunk, and be 0, or so large that the chunk is memory-mapped. Leading dimensions are a
                batch, as in :func:`fastda.covariance`: each has moments of its own. Where they are samples, flatten
                them first.

        Returns:
            Itself.

        Raises:
            TypeError: `chunk` is not a floating tensor.
            ValueError: fewer than two dimensions, or other features or batch dimensions than the chunks before.
        """
        checks.features("(..., samples, features)", chunk=chunk)
        shape = (*chunk.shape[:-2], chunk.shape[-1])
        _check_shape("chunk", self._shape, shape)
        self._allocate(shape, chunk.device)
        for rows in chunk.split(ROWS, -2):
            count = rows.shape[-2]
            if count > 0:
                rows = rows.to(self._mean)
                self._add(count, rows.mean(-2), covariance(rows, correction=0), count)
        return self

    @torch.inference_mode(False)
    def merge(self, *others: CovarianceAccumulator) -> CovarianceAccumulator:
        """Take in the samples of other accumulators, which stay as they are. `a + b` makes a third one instead.

        Returns:
            Itself, so that `CovarianceAccumulator().merge(*parts)` is the whole.

        Raises:
            TypeError: one of them is no CovarianceAccumulator.
            ValueError: one of them has other features or batch dimensions; nothing is merged then.
        """
        shape = self._shape
        for other in others:
            _check_accumulator("others", other)
            _check_shape("others", shape, other._shape)
            shape = other._shape if shape is None else shape
        for other in others:
            if other._shape is not None:
                self._allocate(other._shape, other.device)
                self._add(other._count, other._mean.to(self._mean), other._scatter.to(self._scatter), 1)
        return self

    def __add__(self, other: CovarianceAccumulator) -> CovarianceAccumulator:
        """The samples of both, with the dtype and device of the left one."""
        if not isinstance(other, CovarianceAccumulator):
            return NotImplemented
        return CovarianceAccumulator(dtype=self.dtype, device=self.device).merge(self, other)

    @torch.inference_mode(False)
    def across_processes(self, process_group: dist.ProcessGroup) -> CovarianceAccumulator:
        """The accumulator of the samples that all processes of a group have seen, on each of them.

        This one stays as it is, and may go on to be updated. Every process of the group has to call this; some may have
        seen no samples. Results are the same on all of them.

        Args:
            process_group: a `torch.distributed` group, such as `torch.distributed.group.WORLD`.

        Raises:
            TypeError: not a process group.
            ValueError: accumulators of different shapes or dtypes, on every process.
        """
        check_group(process_group)
        parts = [None] * dist.get_world_size(process_group)
        device_type = None if self.device is None else self.device.type
        dist.all_gather_object(parts, (self._count, self._shape, self.dtype, device_type), group=process_group)
        shapes = sorted({shape for _, shape, _, _ in parts if shape is not None})
        dtypes = sorted({str(dtype) for _, _, dtype, _ in parts})
        if len(shapes) > 1 or len(dtypes) > 1:
            raise ValueError(
                f"process_group: expected one shape and dtype of the moments on all processes, got shapes {shapes} in "
                f"{', '.join(dtypes)}; give all of them features of the same layer"
            )
        whole = CovarianceAccumulator(dtype=self.dtype, device=self._given_device)
        if not shapes:
            return whole
        whole._allocate(shapes[0], self.device or next(type for *_, type in parts if type is not None))
        whole._count = sum(count for count, *_ in parts)
        if self._count > 0:
            whole._mean.add_(self._mean, alpha=self._count / whole._count)
        dist.all_reduce(whole._mean, group=process_group)
        if self._count > 0:
            difference = self._mean - whole._mean
            whole._scatter.add_(self._scatter).addcmul_(
                difference.unsqueeze(-1), difference.unsqueeze(-2), value=self._count
            )
        dist.all_reduce(whole._scatter, group=process_group)
        return whole

    def coral_distance(
        self,
        target: CovarianceAccumulator,
        *,
        correction: int = 1,
        scale: str = "paper",
        mean_weight: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """What :func:`fastda.coral_loss` gives for all samples of this accumulator as source and those of `target`.

        Args:
            target: the accumulator of the other domain.
            correction, scale, mean_weight, reduction: as in :func:`fastda.coral_loss`.

        Returns:
            A scalar, or shape `(...)` with `reduction="none"`, in the dtype of the accumulators. Not differentiable.

        Raises:
            TypeError: `target` is no CovarianceAccumulator.
            ValueError: other features or batch dimensions, too few samples in a domain, an unknown option.

        Example:
            >>> import torch, fastda
            >>> source, target = fastda.CovarianceAccumulator(), fastda.CovarianceAccumulator()
            >>> source = source.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [0.0, 2.0], [0.0, -2.0]]))
            >>> target = target.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
            >>> source.coral_distance(target)
            tensor(0.9167, dtype=torch.float64)
        """
        _check_accumulator("target", target)
        checks.option("scale", scale, SCALES)
        checks.option("reduction", reduction, REDUCTIONS)
        checks.number("mean_weight", mean_weight, least=0)
        source_covariance, target_covariance = (
            accumulator._covariance(name, correction) for name, accumulator in (("source", self), ("target", target))
        )
        _check_shape("target", self._shape, target._shape)
        losses = distance_of_moments(
            (self._mean, source_covariance),
            (target._mean.to(self.device), target_covariance.to(self.device)),
            scale,
            mean_weight,
        )
        return reduce(losses, reduction)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of "count", "mean" and "scatter", the sum of (x − mean)(x − mean)ᵀ; of an unused one "count" alone."""
        state = {"count": torch.tensor(self._count)}
        if self._mean is not None:
            state |= {"mean": self._mean.clone(), "scatter": self._scatter.clone()}
        return state

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave, in this accumulator's dtype and on its device, in place of what was.

        Raises:
            ValueError: entries that are missing or do not fit together; nothing is changed then.
        """
        keys = set(state_dict)
        if keys not in ({"count"}, {"count", "mean", "scatter"}):
            raise ValueError(
                f"state_dict: expected count, mean and scatter, got {', '.join(sorted(map(str, keys))) or 'nothing'}; "
                f"pass what state_dict() returned"
            )
        count = checks.whole_number("state_dict['count']", torch.as_tensor(state_dict["count"]).item(), 0)
        if "mean" not in keys and count > 0:
            raise ValueError(f"state_dict: expected mean and scatter of {count} samples, got neither; save it again")
        mean, scatter = state_dict.get("mean"), state_dict.get("scatter")
        if mean is not None:
            checks.floating("state_dict['mean']", mean)
            checks.floating("state_dict['scatter']", scatter)
            if mean.dim() == 0 or scatter.shape != (*mean.shape, mean.shape[-1]):
                raise ValueError(
                    f"state_dict['scatter']: expected shape (..., D, D) for a mean of shape (..., D), got "
                    f"{tuple(scatter.shape)} for {tuple(mean.shape)}; pass what state_dict() returned"
                )
        self.reset()
        if mean is not None:
            self._allocate(tuple(mean.shape), mean.device)
            self._mean.copy_(mean)
            self._scatter.copy_(scatter)
            self._count = count

    def __copy__(self) -> CovarianceAccumulator:
        return copy.deepcopy(self)  # a shallow copy would share moments that are updated in place

    def __repr__(self) -> str:
        name = type(self).__name__
        if self._mean is None:
            return f"{name}(count=0, dtype={self.dtype})"
        *batch, features = self._shape
        sizes = f"num_features={features}" + (f", batch={tuple(batch)}" if batch else "")
        return f"{name}(count={self._count}, {sizes}, dtype={self.dtype}, device={str(self.device)!r})"

    @property
    def _shape(self) -> tuple[int, ...] | None:
        return None if self._mean is None else tuple(self._mean.shape)

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str) -> None:
        """Moments of no samples, if there are none yet."""
        if self._mean is None:
            self._mean = torch.zeros(shape, dtype=self.dtype, device=self._given_device or device)
            self._scatter = self._mean.new_zeros(*shape, shape[-1])

    def _add(self, count: int, mean: Tensor, scatter: Tensor, times: int) -> None:
        """Merge the moments of `count` more samples, whose sum of products is `times` · `scatter`."""
        if count == 0:
            return
        share, difference = count / (self._count + count), mean - self._mean
        self._scatter.add_(scatter, alpha=times)
        if self._count > 0:
            weight = self._count * share
            self._scatter.addcmul_(difference.unsqueeze(-1), difference.unsqueeze(-2), value=weight)
        self._mean.add_(difference, alpha=share)
        self._count += count

    def _covariance(self, name: str, correction: int) -> Tensor:
        checks.whole_number("correction", correction, 0)
        self._check_count(name, correction + 1, f"{correction + 1} samples (correction + 1)")
        return self._scatter / (self._count - correction)

    def _check_count(self, name: str, least: int, wanted: str) -> None:
        if self._count < least:
            raise ValueError(f"{name}: expected at least {wanted}, got {self._count}; update it with more chunks first")


def _check_accumulator(name: str, value: object) -> None:
    if not isinstance(value, CovarianceAccumulator):
        got = checks.describe(value)
        raise TypeError(f"{name}: expected a CovarianceAccumulator, got {got}; update one with it")


def _check_shape(name: str, expected: tuple[int, ...] | None, got: tuple[int, ...] | None) -> None:
    """Moments of one shape, (..., D), if there are any yet."""
    if None not in (expected, got) and got != expected:
        raise ValueError(
            f"{name}: expected {expected[-1]} features and the batch dimensions {expected[:-1]} of the chunks before, "
            f"got {got[-1]} and {got[:-1]}; use an accumulator for each layer, and flatten dimensions that are samples"
        )
