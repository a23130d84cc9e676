"""How exact a fused op has to be: about as exact as the reference, both measured against float64.

The error of the reference is the largest over all elements, at the input and at the same input scaled by a few factors,
because one evaluation can be exact by luck. A result may be wrong by twice that, plus 4·eps of its own true value.
Nothing here is more exact than float64, so the error of the reference in float64 is taken to be its error in float32
times the ratio of their precisions. What stands for the truth there is wrong too, by as much as that and 4·eps (a
measured error can be 0, where results do not depend on the input): a result may be three times and 8·eps away from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FEW_ELEMENTS = 10_000  # so many and less: all may be exact by luck, so more draws


def is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def map_floating(arguments: Mapping[str, object], change: Callable[[str, Tensor], Tensor]) -> dict[str, object]:
    """The arguments with their floating tensors changed."""
    return {name: change(name, value) if is_floating(value) else value for name, value in arguments.items()}


def single(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x


def random_like(tensor: Tensor, seed: int) -> Tensor:
    """Standard normal values in the shape, dtype and device of `tensor`, the same on each device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def results(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Mapping[str, object],
    *,
    constant: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype, ...] | None = None,
    grad: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The outputs, and the gradients of all floating inputs that are not `constant`, for random incoming gradients.

    `dtypes` are the dtypes to which the incoming gradients are rounded, by default those of the outputs.
    """
    arguments = map_floating(arguments, lambda name, x: x.detach().requires_grad_(grad and name not in constant))
    outputs = as_tuple(function(**arguments))
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    inputs = {name: x for name, x in arguments.items() if is_floating(x) and x.requires_grad}
    if inputs:
        dtypes = dtypes or tuple(y.dtype for y in outputs)
        incoming = [random_like(y.to(dtype), seed + i).to(y) for i, (y, dtype) in enumerate(zip(outputs, dtypes))]
        reached = [i for i, y in enumerate(outputs) if y.requires_grad]
        gradients = torch.autograd.grad(
            [outputs[i] for i in reached], list(inputs.values()), [incoming[i] for i in reached], materialize_grads=True
        )
        named |= {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients)}
    return named


def assert_close_to_truth(name: str, got: Tensor, reference: Tensor, truth: Tensor, error: float) -> None:
    """`got` errs by at most 2·error + 4·eps·|truth|, and is not finite in the places and ways that the reference is.

    In float64 the truth is the reference's own result, which may err by error + 4·eps·|truth|.
    """
    assert got.dtype == reference.dtype, f"{name}: {got.dtype}, the reference has {reference.dtype}"
    assert got.shape == reference.shape, f"{name}: {tuple(got.shape)}, the reference has {tuple(reference.shape)}"
    precision = torch.finfo(got.dtype)
    times, floor = (3, 8) if got.dtype == torch.float64 else (2, 4)
    got, reference, truth = got.double(), reference.double(), truth.double()
    same = (got == reference) | (got.isnan() & reference.isnan())
    allowed = times * error + floor * precision.eps * truth.abs() + 2 * precision.eps * precision.tiny
    close = (got - truth).abs() <= allowed
    good = torch.where(truth.isfinite(), close | (same & ~reference.isfinite()), same)
    if not good.all():
        worst = torch.where(good, -1.0, (got - truth).abs().nan_to_num(torch.inf, torch.inf)).argmax()
        index = tuple(int(i) for i in torch.unravel_index(worst, got.shape))
        raise AssertionError(
            f"{name}{list(index)}: got {got[index]:.17g}, the reference {reference[index]:.17g}, the truth "
            f"{truth[index]:.17g}; allowed error {allowed[index]:.3g}; {int((~good).sum())} of {good.numel()} are wrong"
        )


def in_float64(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Mapping[str, object],
    found: Mapping[str, Tensor],
    **options: object,
) -> dict[str, Tensor]:
    """What the reference would have found without rounding; the incoming gradients are those of its outputs."""
    dtypes = tuple(x.dtype for name, x in found.items() if name.startswith("output"))
    return results(reference, map_floating(arguments, lambda _, x: x.double()), dtypes=dtypes, **options)


def assert_as_accurate_as_reference(
    fused: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Mapping[str, object],
    *,
    constant: tuple[str, ...] = (),
    grad: bool = True,
    seed: int = 0,
) -> None:
    """Values and gradients of `fused` are as exact as those of `reference`, which in float64 is the truth.

    `constant` names the floating arguments that get no gradient. Incoming gradients are random.
    """
    options = {"constant": constant, "grad": grad, "seed": seed}
    expected, got = results(reference, arguments, **options), results(fused, arguments, **options)
    assert got.keys() == expected.keys(), f"outputs: got {len(got)} results, the reference has {len(expected)}"
    true = in_float64(reference, arguments, expected, **options)
    errors = dict.fromkeys(expected, 0.0)
    draws, step = (200, 1 / 1024) if sum(x.numel() for x in expected.values()) <= FEW_ELEMENTS else (8, 1 / 512)
    for draw in range(draws):
        found, truths = expected, true
        if draw > 0 or any(is_floating(x) and x.dtype == torch.float64 for x in arguments.values()):
            scale = 1 - draw * step  # near 1, for the same conditioning; not above, so that nothing overflows
            scaled = map_floating(arguments, lambda name, x: single(x if name in constant else x * scale))
            found = results(reference, scaled, **options)
            truths = in_float64(reference, scaled, found, **options)
        for name, truth in truths.items():
            error = (found[name].double() - truth).abs().nan_to_num(0.0, 0.0)
            relative = torch.finfo(expected[name].dtype).eps / torch.finfo(found[name].dtype).eps
            errors[name] = max(errors[name], relative * error.max().item() if error.numel() else 0.0)
        try:
            for name, truth in true.items():
                assert_close_to_truth(name, got[name], expected[name], truth, errors[name])
            return  # further draws allow more, never less
        except AssertionError:
            if draw == draws - 1:
                raise


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """The same results to the last bit; all NaN count as one."""
    assert one.keys() == other.keys()
    for name, result in one.items():
        assert torch.equal(result.isnan(), other[name].isnan()), name
        assert torch.equal(result.nan_to_num(7.0), other[name].nan_to_num(7.0)), name
