"""How exact a fused op has to be: about as exact as the reference, both measured against float64.

Rounding is a draw of chance: of two equally exact results of one element, one errs more than twice as much as the other
in 30 % of cases. So both are run on the same inputs, and where one draw does not tell, on these scaled by factors near
1 and with other incoming gradients, which round anew under the same conditioning. The error of an element is the root
mean square of its draws; over 64 of them, one twice as large is no chance. That of the reference is the one of its
worst element: what the condition of its inputs makes of rounding. Each element of a fused result may err by twice that,
plus 4·eps of its own true value in each draw.

Nothing here is more exact than float64, so the error of the reference in float64 is taken to be its error in float32
times the ratio of their precisions: the larger of those at the inputs and at inputs 2/3 as large, since float32 is
sure of an answer, and then exact, of which float64 is not (what float64 keeps beside 1 is e⁻³⁶, float32 e⁻¹⁶, whose
square distances are as 3² to 2²). What stands for the truth there is wrong too, by as much as that and 4·eps (a
measured error can be 0, where results do not depend on the input). And sums that float32's ops take in float64 have no
wider type to go to: their gradients err one and a half times as much. So a result may be four times and 8·eps away
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

DRAWS = 64
FEW_DRAWS = 8  # that tell as much of an error four times as large as is allowed
MILDER = 2 / 3  # inputs at which float32 is as sure of its answers as float64 is


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


def assert_same_kind(name: str, got: Tensor, reference: Tensor, truth: Tensor) -> Tensor:
    """Dtype and shape are the reference's, and what is not finite is so in the same way; where an error is a number."""
    assert got.dtype == reference.dtype, f"{name}: {got.dtype}, the reference has {reference.dtype}"
    assert got.shape == reference.shape, f"{name}: {tuple(got.shape)}, the reference has {tuple(reference.shape)}"
    same = (got == reference) | (got.isnan() & reference.isnan())
    bad = ~(truth.isfinite() & got.isfinite()) & ~same  # the reference may overflow where the fused op does not
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(index)}: got {got[index]:.17g}, the reference {reference[index]:.17g}, the truth "
            f"{truth[index]:.17g}; {int(bad.sum())} of {got.numel()} are wrong"
        )
    return truth.isfinite() & got.isfinite()


def in_float64(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Mapping[str, object],
    found: Mapping[str, Tensor],
    **options: object,
) -> dict[str, Tensor]:
    """What the reference would have found without rounding; the incoming gradients are those of its outputs."""
    dtypes = tuple(x.dtype for name, x in found.items() if name.startswith("output"))
    return results(reference, map_floating(arguments, lambda _, x: x.double()), dtypes=dtypes, **options)


def errors(found: Mapping[str, Tensor], truths: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far results are from the truth, in units of their eps."""
    return {
        name: (x.double() - truths[name]).abs().nan_to_num(0.0, 0.0) / torch.finfo(x.dtype).eps
        for name, x in found.items()
    }


def errors_in_float32(
    reference: Callable[..., Tensor | tuple[Tensor, ...]], arguments: Mapping[str, object], **options: object
) -> dict[str, Tensor]:
    arguments = map_floating(arguments, lambda _, x: single(x))
    found = results(reference, arguments, **options)
    return errors(found, in_float64(reference, arguments, found, **options))


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
    doubles = any(is_floating(x) and x.dtype == torch.float64 for x in arguments.values())
    allowed, squares = {}, {}  # by name: sums over the draws, of each element
    for draw in range(DRAWS):
        scale = 1 - draw / 1024  # not above 1, so that nothing overflows
        drawn = map_floating(arguments, lambda name, x: x if draw == 0 or name in constant else x * scale)
        options["seed"] = seed + 1000 * draw
        expected, got = results(reference, drawn, **options), results(fused, drawn, **options)
        assert got.keys() == expected.keys(), f"outputs: got {len(got)} results, the reference has {len(expected)}"
        true = in_float64(reference, drawn, expected, **options)
        if doubles:
            milder = map_floating(drawn, lambda name, x: x if name in constant else x * MILDER)
            both = [errors_in_float32(reference, x, **options) for x in (drawn, milder)]
            err = {name: x.maximum(both[1][name]) for name, x in both[0].items()}
        else:
            err = errors(expected, true)
        failures, hopeless = [], False
        for name, truth in true.items():
            eps = torch.finfo(got[name].dtype).eps
            times, floor = (4, 8) if got[name].dtype == torch.float64 else (2, 4)
            finite = assert_same_kind(name, got[name], expected[name], truth)
            beyond = (got[name].double() - truth).abs() - floor * eps * truth.abs()
            beyond = torch.where(finite, beyond - 2 * eps * torch.finfo(got[name].dtype).tiny, 0.0).clamp_min(0)
            error = err[name] * (times * eps)
            squares[name] = squares.get(name, 0) + beyond.square()
            allowed[name] = allowed.get(name, 0) + error.square()
            worst, most = (x[name].max().item() if truth.numel() else 0.0 for x in (squares, allowed))
            if worst > most:
                index = tuple(int(i) for i in torch.unravel_index(squares[name].argmax(), truth.shape))
                errs, may_err = ((x / (draw + 1)) ** 0.5 for x in (worst, most))
                failures.append(
                    f"{name}{list(index)}: got {got[name][index]:.17g}, the reference {expected[name][index]:.17g}, "
                    f"the truth {truth[index]:.17g}; in {draw + 1} draws it errs by {errs:.3g} beyond {floor}·eps, "
                    f"allowed are {may_err:.3g}; {int((squares[name] > most).sum())} of {truth.numel()} are wrong"
                )
                hopeless |= draw + 1 >= FEW_DRAWS and worst > 16 * most
        if not failures:
            return
        if hopeless:
            break
    raise AssertionError("; ".join(failures))


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """The same results to the last bit; all NaN count as one."""
    assert one.keys() == other.keys()
    for name, result in one.items():
        assert torch.equal(result.isnan(), other[name].isnan()), name
        assert torch.equal(result.nan_to_num(7.0), other[name].nan_to_num(7.0)), name
