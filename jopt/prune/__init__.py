"""Pruning: which weights go, and training that lands on what stays.

Scores, patterns, scopes, schedules (`jopt.schedules`) and application are independent: any goes
with any. Masks are for research, for hand-off, and for what comes after them: a product with masked
weights takes the time of a dense one. `pack` stores pruned weights without their zeros.
"""

from ._blocks import Block as Block
from ._blocks import Channel as Channel
from ._blocks import Tree as Tree
from ._dynamic import DynamicState as DynamicState
from ._dynamic import rigl as rigl
from ._dynamic import set as set
from ._dynamic import static as static
from ._leaves.bits import BitSparse as BitSparse
from ._leaves.csr import CSR as CSR
from ._leaves.nm24 import NM24 as NM24
from ._leaves.within import PackedLeaf as PackedLeaf
from ._masks import Kept as Kept
from ._masks import apply_masks as apply_masks
from ._masks import masks as masks
from ._masks import misfits as misfits
from ._masks import report as report
from ._pack import Packing as Packing
from ._pack import pack as pack
from ._pack import unpack as unpack
from ._packed import Packed as Packed
from ._packed import Pooled as Pooled
from ._packed import masks_of as masks_of
from ._patterns import NM as NM
from ._patterns import Pattern as Pattern
from ._patterns import Unstructured as Unstructured
from ._phases import ac_dc as ac_dc
from ._reconstruct import reconstruct as reconstruct
from ._rewind import rewind as rewind
from ._saliency import activation_norm as activation_norm
from ._saliency import fisher as fisher
from ._saliency import movement as movement
from ._saliency import snip as snip
from ._saliency import taylor as taylor
from ._scores import Score as Score
from ._scores import magnitude as magnitude
from ._scores import random as random
from ._sparsegpt import sparsegpt as sparsegpt
from ._sparsify import HoldState as HoldState
from ._sparsify import SparsifyState as SparsifyState
from ._sparsify import hold as hold
from ._sparsify import sparsify as sparsify
from ._straight import straight_through as straight_through
from ._straight import top_kast as top_kast
from ._wanda import wanda as wanda
