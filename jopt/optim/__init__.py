"""Gradient transformations that optax lacks: regularizers that make weights sparse or low-rank."""

from ._penalties import growing_l2 as growing_l2
from ._penalties import l1_penalty as l1_penalty
from ._penalties import l2_penalty as l2_penalty
from ._proximal import proximal_group_lasso as proximal_group_lasso
from ._proximal import proximal_l1 as proximal_l1
from ._proximal import proximal_nuclear_norm as proximal_nuclear_norm
from ._regularize import RegularizeState as RegularizeState
