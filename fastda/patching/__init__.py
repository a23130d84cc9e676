"""One line that speeds up an existing project of another library: `fastda.patch("easyfsl")`.

What a library computes is replaced by the fused op under the library's own conventions: `domainbed.py`, `easyfsl.py`,
`learn2learn.py`, `pytorch_adapt.py`, `tllib.py` and `torchmeta.py` say what, and what is left alone and why.
`fastda patch -- python train.py` does it to a program that cannot be edited.
"""

from .libraries import LIBRARIES, patch, unpatch

__all__ = ["LIBRARIES", "patch", "unpatch"]
