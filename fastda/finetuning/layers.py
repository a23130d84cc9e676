"""The layers of a model, from its input to its output.

Only modules with parameters count. A module whose parameters are all vectors (a norm, a PReLU, a layer scale) belongs
to the layer before it, and so does an embedding above the input (positions, relative positions). What repeats (a
residual block, a transformer block) is one layer, and so is what embeds the input.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

CONTAINERS = (nn.Sequential, nn.ModuleList)
INPUT_PARAMETER = re.compile(r"token|pos|embed|register")  # cls_token, pos_embed, position_embeddings, reg_token
HEAD = re.compile(r"(^|\.)(head|heads|classifier|classification_head|lm_head|score|logits)(\.|$)")
MAY_FOLLOW_HEAD = re.compile(r"head|classif|score|logit|fc|out|pred|proj|linear|norm")


@dataclass
class Layer:
    """One layer: its name and its parameters, by their names in the model; shared parameters are in the lowest
    layer."""

    name: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def find_layers(model: nn.Module, layers: Sequence[str | Sequence[str]] | None = None) -> list[Layer]:
    """The layers of `model`, lowest first.

    Found from the model's own structure: `nn.Sequential` and `nn.ModuleList` are taken apart, and so are modules that
    hold stacks of blocks (timm's ResNets and vision transformers, Hugging Face's encoders), down to one block a layer.
    Modules are taken in the order in which they were defined, Hugging Face's base models before the heads on them.

    Args:
        model: any module. One that has `parallel_heads`, names of submodules beside its top layer (a domain
            classifier), has them in its top layer.
        layers: names them instead, lowest first: names of modules or parameters (`"blocks.0"` has all that is in it),
            or patterns (`"blocks.*.norm1"`); several in a list are one layer. Together they have to take in every
            parameter.

    Returns:
        At least two layers, which hold every parameter once.

    Raises:
        ValueError: the layers cannot be told apart, or `layers` leaves a parameter out, takes one twice or matches
            nothing; says how to name them.

    Example:
        >>> from torch import nn
        >>> from fastda.finetuning import find_layers
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
        >>> [(layer.name, list(layer.parameters)) for layer in find_layers(model)]
        [('0', ['0.weight', '0.bias', '1.weight', '1.bias']), ('3', ['3.weight', '3.bias'])]
    """
    heads = tuple(getattr(model, "parallel_heads", ()))
    found = _named_layers(model, layers) if layers is not None else _structural_layers(model, heads)
    if len(found) < 2:
        raise _cannot_tell(model, "there is only one" if found else "there is none")
    return found


def matching(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """The parameters that a name of a module or parameter, or a pattern of such names, takes in."""
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(fnmatchcase(part, pattern) for part in _with_parents(name))
    }
    if not parameters:
        names = {part for name, _ in model.named_parameters() for part in _with_parents(name)}
        close = (
            difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
            or sorted(names, key=lambda n: (n.count("."), n))[:5]
        )
        raise ValueError(
            f"layers: expected a name or pattern of modules or parameters of {type(model).__name__}, got {pattern!r}, "
            f"which matches none that has parameters; near it are {', '.join(map(repr, close))} "
            "(see model.named_modules())"
        )
    return parameters


def _with_parents(name: str) -> Iterator[str]:
    """'a.b.weight', 'a.b', 'a'."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _named_layers(model: nn.Module, layers: Sequence[str | Sequence[str]]) -> list[Layer]:
    if isinstance(layers, str):
        raise TypeError(f"layers: expected a list of names, lowest layer first, got {layers!r}; put it into a list")
    found, owner = [], {}
    for entry in layers:
        patterns = [entry] if isinstance(entry, str) else list(entry)
        layer = Layer(", ".join(patterns))
        for pattern in patterns:
            layer.parameters |= matching(model, pattern)
        for name in layer.parameters:
            if name in owner:
                raise ValueError(
                    f"layers: expected each parameter in one layer, got {name!r} in {owner[name]!r} and "
                    f"{layer.name!r}; narrow one of them"
                )
            owner[name] = layer.name
        found.append(layer)
    left_out = [name for name, _ in model.named_parameters() if name not in owner]
    if left_out:
        raise ValueError(
            f"layers: expected every parameter in a layer, got none for {', '.join(left_out[:5])}"
            f"{f' and {len(left_out) - 5} more' if len(left_out) > 5 else ''}; add their modules to the layers that "
            "they belong to"
        )
    return found


def _structural_layers(model: nn.Module, heads: tuple[str, ...]) -> list[Layer]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    beside = {names[id(p)]: p for head in heads for p in model.get_submodule(head).parameters()}
    found: list[Layer] = []
    seen: set[int] = set()
    last = None
    pieces = list(_pieces(model, heads))
    _check_order(model, pieces)
    for piece in pieces:
        new = {names[id(p)]: p for p in piece.parameters if id(p) not in seen and names[id(p)] not in beside}
        seen.update(map(id, piece.parameters))
        if not new:
            continue
        if last is not None and (
            piece.is_vectors or last.is_vectors or piece.is_embedding or last.is_beside(piece, model)
        ):
            found[-1].parameters |= new
            if last.is_vectors and not piece.is_vectors:  # a norm of the input is in the first layer
                found[-1].name, last = piece.name, piece
        else:
            found.append(Layer(piece.name, new))
            last = piece
    if found:
        found[-1].parameters |= beside
    return found


@dataclass
class _Piece:
    """What is not taken apart further."""

    name: str
    parameters: list[nn.Parameter]
    module: nn.Module
    parent: nn.Module
    takes_input: bool = False  # has parameters of its parent's, such as positions

    @property
    def is_vectors(self) -> bool:
        if isinstance(self.module, nn.LayerNorm):
            return not self.takes_input
        return all(p.dim() <= 1 for p in self.parameters)

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.module, nn.Embedding)

    def is_beside(self, above: _Piece, model: nn.Module) -> bool:
        """Whether two pieces are linear layers that cannot follow each other."""
        one, other = self.module, above.module
        if not (isinstance(one, nn.Linear) and isinstance(other, nn.Linear)) or isinstance(self.parent, nn.Sequential):
            return False
        if one.in_features != other.in_features or one.out_features == other.in_features:
            return False
        if self.parent is not above.parent:
            raise _cannot_tell(model, f"{self.name!r} and {above.name!r} may stand side by side")
        return True


def _pieces(model: nn.Module, heads: tuple[str, ...]) -> Iterator[_Piece]:
    """The pieces of a model in order, without the heads."""
    kinds = [m for m in model.modules() if not isinstance(m, CONTAINERS)]
    # By class: a stage of a single block is taken apart like those that have several.
    stacks = {type(m) for m in kinds if _is_stack(m)}
    stages = {type(m) for m in kinds if any(isinstance(c, CONTAINERS) and _is_stack(c) for c in m.children())}
    stages |= {kind for kind in stacks if issubclass(kind, nn.ModuleDict)}

    def holds_stack(module: nn.Module) -> bool:
        return not _is_leaf(module) and any(_is_stack(m) or type(m) in stacks | stages for m in module.modules())

    def is_divisible(parent: nn.Module, child: nn.Module) -> bool:
        """Whether a module stands for several layers rather than one."""
        if _is_leaf(child):
            return False
        if isinstance(child, CONTAINERS) or type(child) in stages:
            return True
        in_container = isinstance(parent, (*CONTAINERS, nn.ModuleDict))
        if in_container and sum(type(sibling) is type(child) for sibling in parent.children()) > 1:
            return False  # a block of a stack
        if holds_stack(child):
            return True
        if in_container and parent is not model:
            return False
        parts = [part for part in child.children() if _has_parameters(part)]
        plain = all(_is_leaf(part) or isinstance(part, nn.Sequential) for part in parts)
        embeds = any(isinstance(part, nn.Embedding) for part in parts) or any(
            True for _ in child.parameters(recurse=False)
        )
        return plain and not embeds and sum(map(_matrices, parts)) > 1

    def split(name: str, module: nn.Module) -> Iterator[_Piece]:
        children = [(_join(name, n), child) for n, child in module.named_children() if _has_parameters(child)]
        children = [(n, child) for n, child in children if n not in heads]
        base = _join(name, getattr(module, "base_model_prefix", ""))  # of Hugging Face's models
        children.sort(key=lambda named: named[0] != base)
        towers = {
            type(child).__name__ for _, child in children if not isinstance(child, CONTAINERS) and holds_stack(child)
        }
        if len(towers) > 1:
            raise _cannot_tell(model, f"{' and '.join(sorted(towers))} may stand side by side")
        if isinstance(module, nn.ModuleList) and sum(isinstance(child, CONTAINERS) for _, child in children) > 1:
            raise _cannot_tell(model, f"the parts of {name!r} may stand side by side")
        own = dict(module.named_parameters(recurse=False))
        for parameter in own:
            if not INPUT_PARAMETER.search(parameter):
                raise _cannot_tell(model, f"parameter {_join(name, parameter)!r} lies in no layer")
        input_parameters = list(own.values())
        for child_name, child in children:
            if is_divisible(module, child):
                parts = split(child_name, child)
            else:
                parts = iter([_Piece(child_name, list(child.parameters()), child, module)])
            for part in parts:
                if input_parameters:
                    part.parameters, part.takes_input, input_parameters = input_parameters + part.parameters, True, []
                yield part

    if _is_leaf(model):
        yield _Piece("", list(model.parameters()), model, model)
    else:
        yield from split("", model)


def _check_order(model: nn.Module, pieces: list[_Piece]) -> None:
    """A head that was defined before what it stands on would have its rate, and that the head's."""
    for lower, upper in zip(pieces, pieces[1:]):
        if HEAD.search(lower.name) and not MAY_FOLLOW_HEAD.search(upper.name):
            raise _cannot_tell(model, f"{lower.name!r} was defined before {upper.name!r}, and may stand above it")


def _is_stack(module: nn.Module) -> bool:
    """Whether it holds blocks that repeat: two or more of one class, each with several layers of its own."""
    blocks = Counter(type(c) for c in module.children() if not _is_leaf(c) and _matrices(c) > 1)
    return max((count for kind, count in blocks.items() if kind not in CONTAINERS), default=0) > 1


def _matrices(module: nn.Module) -> int:
    """How many modules in it have a parameter that is more than a vector."""
    return sum(is_parametrized(m) or any(p.dim() > 1 for p in m.parameters(recurse=False)) for m in module.modules())


def _is_leaf(module: nn.Module) -> bool:
    return is_parametrized(module) or not any(_has_parameters(child) for child in module.children())


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _cannot_tell(model: nn.Module, why: str) -> ValueError:
    names = [name for name, child in model.named_children() if _has_parameters(child)]
    names = names or [name for name, _ in model.named_parameters()]
    example = ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
    return ValueError(
        f"model: expected layers that can be told apart, got {type(model).__name__}, where {why}; "
        f"name them from input to output, as in layers=[{example}]"
    )
